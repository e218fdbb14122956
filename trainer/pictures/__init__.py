"""From a heap of pictures to a data set: bringing in, editing, checking, project folders."""
