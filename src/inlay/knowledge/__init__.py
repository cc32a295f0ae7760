"""What a model learns of facts: distances, states, interference, and a report of them."""
