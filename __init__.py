"""deltatok: extract video features once, train world models on them many times."""
