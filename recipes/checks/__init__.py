"""What must hold, at length: outputs that never change, states that survive kills, many threads and many requests."""
