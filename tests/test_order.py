"""The order in which several workers take the test files."""

from pathlib import Path
from types import SimpleNamespace


def collected(file, *markers):
    return SimpleNamespace(path=Path(file), get_closest_marker=lambda name: name in markers or None)


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
