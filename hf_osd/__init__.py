"""hf_osd: Online Speculative Decoding for Hugging Face. A draft model that learns from the traffic it serves."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public names by the module that has them. Imported on first use: `import hf_osd` alone loads no torch and no transformers.
_PUBLIC = {
    "OnlineAssistant": "assistant",
    "OnlineConfig": "config",
    "RoutedAssistant": "routed",
    "OnlineCandidateGenerator": "generation.candidates",
    "Feedback": "feedback.feedback",
    "FeedbackBuffer": "feedback.buffer",
    "OnlineGKDTrainer": "distill.trainer",
    "RefreshAssistantCallback": "distill.callbacks",
    "choose_shape": "shapes.choice",
    "grow_draft": "saving.drafts",
    "grow_feature_draft": "models.feature_growth",
    "save_feature_draft": "saving.feature_drafts",
    "load_feature_draft": "saving.feature_drafts",
    "record_answers": "feedback.recording",
    "Rehearsal": "learning.rehearsal",
    "compare_outputs": "metrics.parity",
    "enable": "generation.patch",
    "disable": "generation.patch",
}
__all__ = [*_PUBLIC, "__version__"]

if TYPE_CHECKING:
    from hf_osd.assistant import OnlineAssistant as OnlineAssistant
    from hf_osd.config import OnlineConfig as OnlineConfig
    from hf_osd.distill.callbacks import RefreshAssistantCallback as RefreshAssistantCallback
    from hf_osd.distill.trainer import OnlineGKDTrainer as OnlineGKDTrainer
    from hf_osd.feedback.buffer import FeedbackBuffer as FeedbackBuffer
    from hf_osd.feedback.feedback import Feedback as Feedback
    from hf_osd.feedback.recording import record_answers as record_answers
    from hf_osd.generation.candidates import OnlineCandidateGenerator as OnlineCandidateGenerator
    from hf_osd.generation.patch import disable as disable
    from hf_osd.generation.patch import enable as enable
    from hf_osd.learning.rehearsal import Rehearsal as Rehearsal
    from hf_osd.metrics.parity import compare_outputs as compare_outputs
    from hf_osd.models.feature_growth import grow_feature_draft as grow_feature_draft
    from hf_osd.routed import RoutedAssistant as RoutedAssistant
    from hf_osd.saving.drafts import grow_draft as grow_draft
    from hf_osd.saving.feature_drafts import load_feature_draft as load_feature_draft
    from hf_osd.saving.feature_drafts import save_feature_draft as save_feature_draft
    from hf_osd.shapes.choice import choose_shape as choose_shape


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hf_osd' has no attribute {name!r}")
    return getattr(import_module(f"hf_osd.{_PUBLIC[name]}"), name)


def __dir__():
    return sorted(__all__)
