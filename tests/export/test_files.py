from __future__ import annotations

import pytest

from dmcp.errors import ExportError
from dmcp.export.files import staged


def fail_in(folder, other=None):
    with staged(folder) as stage:
        (stage / "network.py").write_text("half")
        if other is not None:
            (folder / other).write_text("whole")
        raise ExportError("it failed")


def test_after_an_error_no_folder_is_left(tmp_path):
    with pytest.raises(ExportError, match="it failed"):
        fail_in(tmp_path / "new" / "export")
    assert not [*tmp_path.iterdir()]


def test_after_an_error_what_another_wrote_stays(tmp_path):
    with pytest.raises(ExportError, match="it failed"):
        fail_in(tmp_path / "export", other="other.py")
    assert [each.name for each in (tmp_path / "export").iterdir()] == ["other.py"]
