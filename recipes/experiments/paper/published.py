"""Figures that Online Speculative Decoding (arXiv 2310.07177) publishes. Those of curves were read off its plots, to about .01."""

from __future__ import annotations

from dataclasses import dataclass

SETTING = {
    "target": "Vicuna-7B; FLAN-T5-XL",
    "draft": "LLaMA-160M, distilled before; T5-small",
    "machine": "A100",
    "dtype": "not published",
    "new tokens at most": "128",
    "k, update interval": "5, 8",
    "α is": "a moving average over 50 requests of a stream",
}


@dataclass(frozen=True)
class Published:
    """The paper's α of one stream: of the static draft, of the online one after so many requests, and of offline distillation before and after."""

    name: str
    static: float
    online: dict[int, float]
    offline: tuple[float, float]
    shift: str  # in the sharp shift maths, SQL, finance, code

    def gain(self, requests: int) -> float | None:
        """Return what the online draft gained over the static one after so many requests; `None` where that cannot be read."""
        return None if requests not in self.online else self.online[requests] - self.static


PUBLISHED = {
    "sql": Published(
        "Spider", 0.44, {250: 0.59, 500: 0.61, 1000: 0.64, 2000: 0.68}, (0.28, 0.76), ".46-.50, .62 after 500, .67"
    ),
    "math": Published("GSM8K", 0.63, {250: 0.68, 500: 0.70, 1000: 0.72, 2000: 0.73}, (0.58, 0.75), ".52 → .73"),
    "code": Published(
        "Python", 0.46, {250: 0.55, 500: 0.57, 1000: 0.60, 2000: 0.64}, (0.38, 0.65), "dips to .55, ends at .60"
    ),
    "finance": Published("finance", 0.61, {250: 0.62, 500: 0.63, 1000: 0.64, 2000: 0.65}, (0.57, 0.67), ".62 → .66"),
}
T5 = ".13 → .78, .29 → .62, .28 → .81, .39 → .63 (offline, four streams)"
LANGUAGES = "+.1 to +.2 in under 2,000 requests of a language, a draft for each (chats)"
CHATS = "+.03 to +.1 by eye, a draft for each topic"
MIXTURE = "maths holds at .71 after finance has been learnt"
GRADUAL = "dips far less than in the sharp shift"


def published(stream: str) -> Published | None:
    """Find the paper's figures for a stream such as `sql` or `sql_spider_dev`; `None` if it has none."""
    return PUBLISHED.get(stream.split("_")[0])
