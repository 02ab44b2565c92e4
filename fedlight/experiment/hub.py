"""The Hugging Face Hub: a folder becomes a repository there."""

from pathlib import Path

from fedlight.runtime.errors import BadInput
from fedlight.runtime.printable import plain_line
from fedlight.runtime.secret import redacted


def check_repo(repo: str) -> None:
    """Raises BadInput where a name is not OWNER/NAME, as the Hub allows it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise BadInput(f"--push: {plain_line(str(error))}") from error
    if repo.count("/") != 1:
        raise BadInput(f"--push: {repo} must be OWNER/NAME")


def upload(folder: Path, repo: str) -> str | None:
    """Uploads a folder as a repository of a model; a new one is private.

    The token is that of `hf auth login` or HF_TOKEN.

    Returns:
        Why it was not uploaded; None where it was.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="A model of fedlight")
    except Exception as error:  # of the Hub, of its HTTP library, of sockets
        return redacted(plain_line(str(error))) or type(error).__name__
    return None
