"""From raw values to arrays, and from a model's values to answers: what training, prediction and packages share. No torch."""
