"""What mixes the attention of heads."""
