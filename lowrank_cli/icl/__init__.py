"""In-context learning: demonstrations, queries, hidden states, and methods that calibrate answers with them."""
