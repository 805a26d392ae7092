"""Runs `hf-osd sidecar`: reads the flags, joins the parts, and serves until a signal ends it."""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_osd.config import OnlineConfig
from hf_osd.system.bounds import Bound, check_options, number, option, whole
from hf_osd.system.output_paths import check_apart, check_writable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.engines.sidecar.sidecar import Sidecar

logger = logging.getLogger(__name__)

_NEEDS = ("starlette", "uvicorn", "httpx", "prometheus_client")
_INSTALL = "pip install 'hf-osd[sidecar]'"


def _text(remedy: str) -> Bound:
    return Bound(remedy, lambda value: isinstance(value, str))


@dataclass
class SidecarArguments:
    """Where the engines are, what they serve, and where the sidecar listens. All fields of `OnlineConfig` are flags too."""

    engine: str = option(
        "", _text("give a URL, or several with ',' between"), "The engines' URLs, such as http://127.0.0.1:8000."
    )
    target: str = option(
        "",
        _text("give a folder or Hub id"),
        "The target that they serve: of it the config and the tokenizer are read, and its weights only with --reread.",
    )
    draft: str = option("", _text("give a folder or Hub id"), "The draft that they serve, in transformers' own form.")
    listen: str = option("127.0.0.1:8100", _text("give host:port"), "Address to listen on.")
    folder: str = option(
        "sidecar-drafts",
        _text("give a folder"),
        "Folder for the weights that are pushed, which the engines must be able to read under the same path. A sidecar that is started again goes on from the newest.",
    )
    top_log_probs: int = option(
        20, whole(1), "Log-probs a position to ask the engines for, as far as they give as many."
    )
    reread: float = option(
        0.0,
        number(0),
        "Read answers once more with a copy of the target, for at most this share of the time, such as 0.25; for drafts that learn from the target's hidden states, "
        "or in place of log-probs. 0 asks the engines for log-probs instead.",
    )
    reread_device: str = option("cpu", _text("give a device, such as cuda:1"), "Where that copy lies.")
    share: float = option(1.0, number(0), "Share of the requests that teach, drawn at random.")
    report_every: float = option(60.0, number(0), "Seconds between two lines of progress; 0 prints none.")
    judge_drafts: int = option(
        2000, whole(1), "Rounds of an engine over which its acceptance after a push is compared with before."
    )

    def __post_init__(self):
        check_options(self)
        if not self.engines:
            raise ValueError("`engine` is empty; give the URL of an engine, such as --engine http://127.0.0.1:8000.")
        for name in ("target", "draft"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is empty; give what the engines were started with.")
        if re.fullmatch(r"\S+:\d{1,5}", self.listen) is None:
            raise ValueError(f"`listen` is {self.listen!r}; give host:port, such as 127.0.0.1:8100.")
        if self.reread > 1:
            raise ValueError(f"`reread` is {self.reread}; give a share of the time, from 0 to 1.")
        if not 0 < self.share <= 1:
            raise ValueError(f"`share` is {self.share}; give a share above 0 up to 1.")
        check_apart({"--folder": self.folder}, {"--target": self.target, "--draft": self.draft})
        check_writable("--folder", self.folder, folder=True)

    @property
    def engines(self) -> list[str]:
        return list(dict.fromkeys(url.strip().rstrip("/") for url in self.engine.split(",") if url.strip()))

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status: 2 for what the user can mend."""
    from transformers.utils.logging import disable_progress_bar
    from trl import TrlParser

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("hf_osd").setLevel(logging.INFO)
    disable_progress_bar()
    try:
        check_installed()
        parser = TrlParser((SidecarArguments, OnlineConfig), prog="hf-osd sidecar")
        parser.set_defaults_with_config(learn="process", suffix_cache=False)
        args, config = parser.parse_args_and_config(argv)
        run(args, config)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"hf-osd: {error}", file=sys.stderr)
        return 2
    return 0


def check_installed():
    """Check that the sidecar's packages are there.

    Raises:
        RuntimeError: if not; it names the extra that has them.
    """
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"The sidecar needs {', '.join(missing)}: {_INSTALL}.")


def run(args: SidecarArguments, config: OnlineConfig):
    """Serve until a signal comes.

    Raises:
        OSError: if target or draft cannot be read, an engine not be reached, or the address not be listened on.
        ValueError: if the draft is not one that learns from outside, or not the target's.
    """
    import uvicorn

    from hf_osd.engines.sidecar.app import make_app

    sidecar = make_sidecar(args, config)
    host, port = args.address
    ends = threading.Event()
    try:
        if args.report_every:
            threading.Thread(target=_report, args=(sidecar, args.report_every, ends), daemon=True).start()
        # No log of requests: their paths may say what they ask. The engine's own date and server headers pass.
        settings = {"log_level": "warning", "access_log": False, "server_header": False, "date_header": False}
        server = uvicorn.Server(
            uvicorn.Config(make_app(sidecar), host, port, timeout_graceful_shutdown=30, **settings)
        )
        print(f"hf-osd: in front of {', '.join(args.engines)} on http://{args.listen}", file=sys.stderr, flush=True)
        server.run()
        if not server.started:
            raise OSError(f"{args.listen} cannot be listened on; give another address with --listen.")
    finally:
        ends.set()
        sidecar.close()


def make_sidecar(args: SidecarArguments, config: OnlineConfig) -> Sidecar:
    """Join servers, assistant, pusher and sidecar; return the sidecar, which closes them all.

    Raises:
        OSError, ValueError: as `run`.
    """
    from transformers import AutoConfig, AutoTokenizer

    from hf_osd.assistant import OnlineAssistant
    from hf_osd.engines.pusher import DraftPusher
    from hf_osd.engines.servers import connect
    from hf_osd.engines.sidecar.rereading import AnswerReader
    from hf_osd.engines.sidecar.sidecar import Sidecar
    from hf_osd.saving.drafts import load_model

    begins = newest(args.folder)
    copy = load_model(args.target, dtype="auto").to(args.reread_device) if args.reread else None
    draft, layout = _load_draft(args.draft if begins is None else begins, copy)
    target = AutoConfig.from_pretrained(args.target).get_text_config(decoder=True)
    width = draft.config.get_text_config(decoder=True).vocab_size
    if width != target.vocab_size:
        raise ValueError(
            f"The draft has a vocabulary of {width} tokens, the target one of {target.vocab_size}: an engine takes no such draft. Make one with hf-osd grow --kind layers."
        )
    servers = [connect(url) for url in args.engines]
    assistant = OnlineAssistant(draft, config)
    initial = Path(args.draft).resolve()  # what the engines were started with, unless other weights were pushed since
    pusher = DraftPusher(
        servers,
        Path(args.folder).resolve(),
        judge_drafts=args.judge_drafts,
        initial=initial if begins is None and initial.is_dir() else None,
    )
    sidecar = Sidecar(
        assistant,
        servers,
        pusher,
        top_k=args.top_log_probs,
        share=args.share,
        seed=config.seed,
        tokenizer=AutoTokenizer.from_pretrained(args.target),
        pushes_first=begins is not None,
        reader=None if copy is None else AnswerReader(copy, draft, assistant.osd_config, args.reread),
        layout=layout,
    )
    pusher.on_taken_back = sidecar.taken_back
    return sidecar


def _load_draft(name: str | Path, target: PreTrainedModel | None) -> tuple[PreTrainedModel, str]:
    """Load what engines draft with, and tell the layout in which they read it.

    Raises:
        OSError, ValueError: as the loading of drafts; and for a feature-level draft if there is no target to read answers, or no engine reads its layout.
    """
    from hf_osd.saving.drafts import load_draft
    from hf_osd.saving.feature_drafts import layout_of, load_feature_draft

    layout = layout_of(name)
    if layout is None:
        return load_draft(name, dtype="auto"), "osd"
    if layout == "osd":
        raise ValueError(
            f"The draft {name} reads the target's hidden states and is saved in a layout that no engine loads; save it with layout='eagle3', or hf-osd grow --layout eagle3."
        )
    if target is None:
        raise ValueError(
            f"The draft {name} learns from the target's hidden states, which an engine does not hand out. Add --reread 0.25, and the sidecar reads answers once more, with "
            "its own copy of the target, for at most a quarter of the time; or give a draft that is a whole model, such as hf-osd grow --kind layers makes."
        )
    return load_feature_draft(name, target, keep_head=True), layout


def newest(folder: str | Path) -> Path | None:
    """Find the newest weights that a sidecar has written into a folder, `None` if there are none."""
    from hf_osd.engines.pusher import saved_drafts

    whole = {number: path for number, path in saved_drafts(Path(folder)).items() if (path / "config.json").is_file()}
    return whole[max(whole)] if whole else None


def _report(sidecar: Sidecar, seconds: float, ends: threading.Event):
    """Print a line of progress every so often."""
    from hf_osd.engines.sidecar.status import progress_line

    while not ends.wait(seconds):
        print(progress_line(sidecar.figures()), file=sys.stderr, flush=True)
