"""Other engines that serve: this room brings a learnt draft into an engine that runs. Each module runs in its engine's environment, and needs the engine and nothing else of hf_osd."""
