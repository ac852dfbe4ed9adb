"""What `verify` and `inspect` look at: shards and records, weights, pictures of a latent cache."""
