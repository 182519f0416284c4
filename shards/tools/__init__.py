"""What `deltatok-shards` runs on a cache: info, verify, repair, export."""
