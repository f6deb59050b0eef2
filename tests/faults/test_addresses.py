"""An address where only folders of this machine can be written, or none of its kind, is refused first."""

from pathlib import Path

import pytest

from fineline_jax import interface
from fineline_jax.cli import main
from fineline_jax.data.storage import open_data_set
from fineline_jax.demo import prepare_world
from fineline_jax.errors import UserError


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("data prepare text absent --tokenizer absent --out az://b/x", "--out az://b/x"),
        ("data prepare amber absent --out=az://b/x", "--out az://b/x"),
        ("data prepare world --out=s3://b/x", "--out s3://b/x"),
        ("tasks prepare absent --tokenizer absent --out gs://b", "--out gs://b"),
        ("pretrain absent --run az://b/x", "--run az://b/x"),
        ("pretrain demo --data.sources.0.path az://b/x", "--data.sources.0.path az://b/x"),
        ("score absent --suite piqa --out az://b/x", "--out az://b/x"),
        ("analyze absent --out s3://b/x", "--out s3://b/x"),
        ("export-scores absent --out gs://b/x", "--out gs://b/x"),
        ("export absent gs://b/x", "DIR gs://b/x"),
        ("import absent gs://b/x", "RUN gs://b/x"),
        ("demo --out gs://b/x", "--out gs://b/x"),
    ],
)
def test_commands(command: str, told: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """The other arguments are wrong as well."""
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    [line] = capsys.readouterr().err.splitlines()
    staged = ", gs://… or s3://…" if "az://" in told else ""  # where these are staged, another kind of bucket is not
    assert line == f"fineline: {told}: must be a folder of this machine{staged}; mount the bucket, or give another"
    assert list(tmp_path.iterdir()) == []


def test_functions(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--out gs://b/x: must be a folder of this machine"):
        interface.prepare_pack("piqa", "absent", "gs://b/x")
    with pytest.raises(UserError, match=r"--out gs://b/x: must be a folder of this machine; mount the bucket"):
        prepare_world(Path("gs://b/x"))
    with pytest.raises(UserError, match=r"--data.sources.0.path s3://b/x: must be a folder"):
        open_data_set(Path("s3://b/x"), "--data.sources.0.path")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a:").mkdir()  # of one letter: a drive
    with pytest.raises(UserError, match="not a prepared data set"):
        open_data_set(Path("a:/"))
