"""The folder of an adapter of the PEFT library, on this machine or on the Hub."""

from __future__ import annotations

from pathlib import Path

from lowrank_cli.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SECONDS = 5  #: within which the Hub has to answer


def fetch(adapter: str, revision: str | None, files: tuple[str, ...] = (CONFIG, WEIGHTS)) -> Path:
    """The folder ``adapter``, or that of the Hub repository of this name in the local cache, with ``files``.

    Raises:
        UserError: there is neither, or a file is missing.
    """
    folder = Path(adapter).expanduser()
    if folder.is_dir():
        for name in files:
            if not (folder / name).is_file():
                raise UserError(f"adapter: '{adapter}' holds no {name}, so it is no adapter of the PEFT library")
        return folder
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        known = [huggingface_hub.try_to_load_from_cache(adapter, name, revision=revision) for name in files]
        if not all(isinstance(path, str) for path in known):
            huggingface_hub.HfApi().model_info(adapter, revision=revision, timeout=SECONDS)  # downloads try for longer
            known = [huggingface_hub.hf_hub_download(adapter, name, revision=revision) for name in files]
    except HFValidationError:
        raise UserError(f"adapter: there is no folder '{adapter}'") from None
    except (HfHubHTTPError, EntryNotFoundError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"adapter: there is no folder '{adapter}', and on the Hub: {reason}") from None
    except Exception as error:  # every transport has its own family of network errors
        raise UserError(
            f"adapter: there is no folder '{adapter}', and the Hub cannot be reached ({type(error).__name__})"
        ) from None
    return Path(str(known[0])).parent
