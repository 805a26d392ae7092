"""How many tokens to draft, and by which source: acceptance by position, costs and the worth of a block. Arithmetic, without torch; it asks nobody."""
