"""Memory that is available lies within the limits of control groups, of both versions."""

import psutil
import pytest

from streamprune.paging import host_memory
from streamprune.paging.host_memory import available_memory

FREE = psutil.virtual_memory()._replace(available=1000)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 1,000 bytes free; makes what the kernel says of groups."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: FREE)
    monkeypatch.setattr(host_memory, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(host_memory, "GROUPS", tmp_path / "groups")

    def say(membership, files):
        (tmp_path / "membership").write_text(membership)
        for name, content in files.items():
            (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "groups" / name).write_text(content)

    return say


def second(group, limit, used, cached):
    stat = f"anon {used - cached}\ninactive_file {cached}\nactive_file 0\n"
    return {f"{group}memory.max": limit, f"{group}memory.current": f"{used}\n", f"{group}memory.stat": stat}


def first(group, limit, used, cached):
    stat = f"inactive_file 1\ntotal_inactive_file 0\ntotal_active_file {cached}\n"
    names = ("limit_in_bytes", "usage_in_bytes", "stat")
    return {f"memory/{group}memory.{name}": each for name, each in zip(names, (limit, f"{used}\n", stat), strict=True)}


@pytest.mark.parametrize(
    "membership,files,available",
    [
        ("0::/job/step\n", second("job/step/", "700\n", 300, 200), 600),
        ("0::/job/step\n", second("job/step/", "max\n", 300, 0) | second("job/", "500\n", 400, 50), 150),
        ("0::/\n", second("", "400\n", 100, 0), 300),  # of a container, which sees its own group as the root
        ("0::/../other\n", second("", "400\n", 100, 0), 300),
        ("0::/job\n", second("job/", "5000\n", 10, 0), 1000),
        ("0::/job\n", second("job/", "100\n", 300, 0), 0),
        ("5:cpu:/x\n4:cpuset,memory:/slurm/job\n0::/\n", first("slurm/job/", "800\n", 500, 100), 400),
        ("4:memory:/slurm/job\n", first("", "9223372036854771712\n", 500, 100), 1000),
        ("", {}, 1000),
    ],
)
def test_it_is_the_least_that_a_group_leaves(membership, files, available, machine):
    machine(membership, files)
    assert available_memory() == available


def test_where_the_kernel_says_nothing_of_groups_it_is_what_is_free(machine, tmp_path):
    assert available_memory() == 1000
