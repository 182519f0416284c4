"""Delta-token shards: WebDataset tars of packed windows."""
