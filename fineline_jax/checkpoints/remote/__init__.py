"""Checkpoints elsewhere: listings of hubs, buckets and web servers, verified downloads, the folder they are kept in."""
