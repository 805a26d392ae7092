"""The draft as a model: this room makes copies that share weights, adapters, hot swaps of the serving weights, and reduced heads. It knows nothing of calls or of learning."""
