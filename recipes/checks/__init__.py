"""Long checks of the library's promises: unchanged outputs, states that survive kills, many threads and many requests."""
