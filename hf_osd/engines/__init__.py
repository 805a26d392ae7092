"""Other engines that serve: how what was learnt here gets into one that runs. A module runs in its engine's environment, and needs the engine and nothing else of hf_osd."""
