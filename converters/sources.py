"""The file that the name of a checkpoint stands for: a path, a folder, a Hub id or `demo`."""

import re
from contextlib import suppress
from pathlib import Path

import sam2jq
from converters import hf_config
from sam2jq.deploy.folder import is_onnx_folder
from sam2jq.errors import UserError, few, suggest
from sam2jq.file_kinds import WAY_OUT, foreign_kind
from sam2jq.files import home

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FILES = (".pt", ".pth", ".safetensors", ".json")
INDEX = "model.safetensors.index.json"  # of a model in several files
# what may be in a folder: a package of a run, or Hugging Face's files; in the order of preference
CONTENTS = ("package.safetensors", "package.pt", "model.safetensors", INDEX)
ASSETS = Path(sam2jq.__file__).parent / "assets"


def find(source: str) -> Path:
    """The local file that `source` names, downloaded from the Hub if it is a Hub id.

    In a folder it is the first of CONTENTS that exists.
    Raises FileNotFoundError if there is none, and UserError for an address.
    """
    if URL.match(source):
        raise UserError(f"checkpoint {source} is an address: download the file first, and give its path")
    if source == "demo":
        return ASSETS / "nano.safetensors"
    path = Path(home(source))
    if path.is_dir():
        path = find_in(path)
    if path.is_file():
        return path
    if HUB_ID.fullmatch(source) and path.suffix not in FILES and not Path(source).exists():
        return download(source)
    near = suggest(path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [])
    raise FileNotFoundError(
        f"no checkpoint at {path}{near}; give a file, a Hub id such as facebook/sam2.1-hiera-tiny, or random:0"
    )


def find_in(folder: Path) -> Path:
    """The first of CONTENTS that is in a folder. Raises FileNotFoundError, which names what else is there."""
    if found := next(filter(Path.is_file, (folder / name for name in CONTENTS)), None):
        return found
    if is_onnx_folder(folder):
        raise UserError(
            f"{folder} holds ONNX files, which only segment (with prompts), track and evaluate run: give the package"
        )
    if what := foreign_kind(folder):
        raise UserError(f"{folder} is {what}, not a checkpoint: {WAY_OUT}")
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", *FILES[:3]))
    way_out = f"give a file in it by its path: {few(others)}" if others else "give a file"
    raise FileNotFoundError(f"no checkpoint in {folder}, where {', '.join(CONTENTS)} are looked for; {way_out}")


def download(repository: str) -> Path:
    """model.safetensors of a Hub repository, with its configuration beside it; from the local cache if it is there.

    Raises UserError if the extra `hub` is not installed, or if the file cannot be fetched.
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        raise UserError(
            f"{repository} is a Hub id and that needs the extra hub: pip install 'sam2jq[hub]', or give a file"
        ) from error
    try:
        path = Path(hf_hub_download(repository, "model.safetensors"))
        for name in hf_config.FILES:  # beside the weights, where the repository has them
            with suppress(EntryNotFoundError):
                hf_hub_download(repository, name)
    except Exception as error:  # the library raises errors of many classes for network, Hub and cache
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot fetch {repository} from the Hub ({reason}): go online, or give a file") from error
    return path
