"""This generation strategy of the Hub is online speculative decoding: `generate` with an `assistant_model` that learns from its verification.

    from hf_osd import OnlineAssistant

    assistant = OnlineAssistant(draft)
    target.generate(**inputs, assistant_model=assistant, custom_generate="<this repository>", trust_remote_code=True)

The output is the target's own. All that runs is in the package hf_osd (pip install hf-osd); nothing in transformers is patched for it.
"""

from hf_osd.generation.patch import generate_unpatched


def generate(model, assistant_model=None, **kwargs):
    """Returns the output of `model.generate(assistant_model=assistant_model, **kwargs)`. transformers calls it with `generate`'s own arguments.

    Args:
        model (`PreTrainedModel`): the target.
        assistant_model (`OnlineAssistant`): the assistant. Any other assistant model drafts as it does without this strategy.
        **kwargs: all other arguments of `generate`.
    """
    return generate_unpatched(model, assistant_model=assistant_model, **kwargs)
