"""Online speculative decoding as a generation strategy of the Hub: `generate` with an `assistant_model` that learns from what it is verified against.

    from hf_osd import OnlineAssistant

    assistant = OnlineAssistant(draft)
    target.generate(**inputs, assistant_model=assistant, custom_generate="<this repository>", trust_remote_code=True)

The output is the target's own. All that runs is in the package hf_osd (pip install hf-osd); nothing in transformers is patched for it.
"""

from hf_osd.generation.patch import generate_unpatched


def generate(model, assistant_model=None, **kwargs):
    """What `model.generate(assistant_model=assistant_model, **kwargs)` returns. Called by transformers, with `generate`'s own arguments.

    Args:
        model (`PreTrainedModel`): the target.
        assistant_model (`OnlineAssistant`): the draft in service. Any other assistant drafts as it does without this strategy.
        **kwargs: all else that `generate` takes.
    """
    return generate_unpatched(model, assistant_model=assistant_model, **kwargs)
