"""The order of the collected test files, and the sample of --fast."""

from pathlib import Path
from types import SimpleNamespace

import pytest


def collected(file, *markers):
    return SimpleNamespace(path=Path(file), get_closest_marker=lambda name: name in markers or None)


class Case:
    """A case of a test with the marker sample."""

    path = Path("test_file.py")

    def __init__(self, name, *named):
        self.nodeid, self.callspec = f"test_file.py::test[{name}]", SimpleNamespace(id=name)
        self.marker, self.added = pytest.mark.sample(*named).mark, []
        self.add_marker = self.added.append

    def get_closest_marker(self, name):
        return self.marker if name == "sample" else None


def test_workers_start_with_the_files_of_slow_tests(pytestconfig):
    assert not pytestconfig.option.loadscopereorder, "pytest-xdist would start with the files of most tests"
    conftest = pytestconfig.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))
    given = [collected("quick.py"), collected("quick.py"), collected("ranks.py", "ddp"), collected("fast.py")]
    given += [collected("slow.py", "slow"), collected("ranks.py"), collected("slow.py")]
    for config, files in (
        (SimpleNamespace(workerinput={}), ["slow.py"] * 2 + ["ranks.py"] * 2 + ["quick.py"] * 2 + ["fast.py"]),
        (SimpleNamespace(), [str(item.path) for item in given]),
    ):
        items = list(given)
        conftest.pytest_collection_modifyitems(config, items)
        assert [str(item.path) for item in items] == files


def test_fast_leaves_out_the_cases_that_are_not_in_the_sample(pytestconfig):
    conftest = pytestconfig.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))
    cases = [Case(name, "byol", "cissl-*") for name in ("byol", "mec", "cissl-lars", "cissl")]
    conftest.pytest_collection_modifyitems(SimpleNamespace(args=["tests"]), [*cases, collected("quick.py")])
    assert [case.added for case in cases] == [[], ["more"], [], ["more"]]
    renamed = [Case("mec", "byol")]
    with pytest.raises(pytest.UsageError, match=r"the marker sample names no case of test_file\.py::test$"):
        conftest.pytest_collection_modifyitems(SimpleNamespace(args=["tests"]), renamed)
    conftest.pytest_collection_modifyitems(SimpleNamespace(args=["tests/test_file.py::test[mec]"]), renamed)
