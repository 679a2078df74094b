"""What a model's attention does: maps, routing, temperatures, scores of heads."""
