"""Files the product brings along."""
