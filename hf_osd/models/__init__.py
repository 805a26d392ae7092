"""The draft as a model: copies that share weights, what adapters do to them, swaps of what serves, its head and vocabulary. It knows nothing of calls or of learning."""
