"""Training pictures: folders, captions, buckets, caches, batches."""
