"""Plug-ins as pip installs them: found, held against the digest of the release before they are imported, and run."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.artifact import TensorSpec
from common.artifact.pipeline import PipelineStep, code_digest
from common.ids import Digest
from common.pipelines import Guard, PluginMissing, StepFailed, installed, open_chain
from common.pipelines.installed import check_installed, code_of, digest_of_plugin, find_plugin, plugins
from tests.plugin_wheels import install, make_wheel

X = (TensorSpec("x", "FP32", (-1, 4)),)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that Python imports from, like an environment's own; what was imported from it is forgotten again."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(installed, "_imported", {})
    for name in [name for name in sys.modules if name.startswith("acme_")]:
        monkeypatch.delitem(sys.modules, name)
    return site


def step(version: str = "1.0", code: Digest | None = None, **parameters: object) -> PipelineStep:
    """The step, with the digest of what is installed unless told."""
    digest = code or digest_of_plugin(find_plugin("acme.add"))
    return PipelineStep(plugin="acme.add", version=version, code=(digest,), parameters=parameters)


def test_a_step_from_a_wheel_runs(tmp_path: Path, site: Path) -> None:
    install(make_wheel(tmp_path), site)
    chain = open_chain([step(amount=2), step(amount=3)], X, code_of, Guard())
    assert chain.outputs == X
    np.testing.assert_array_equal(chain.run({"x": np.ones((2, 4), np.float32)})["x"], np.full((2, 4), 6, np.float32))


def test_the_digest_is_that_of_the_wheels_own_files_wherever_it_is_installed(tmp_path: Path, site: Path) -> None:
    install(make_wheel(tmp_path), site)
    code_of(step())  # which leaves byte code beside the files
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(site)], check=True)
    paths = ["acme_add/__init__.py", "acme_add/steps.py"]
    paths += [f"acme_add-1.0.dist-info/{name}" for name in ("METADATA", "entry_points.txt")]
    assert digest_of_plugin(find_plugin("acme.add")) == code_digest(
        (path, (site / path).read_bytes()) for path in paths
    )


def test_the_command_prints_the_digest(tmp_path: Path, site: Path) -> None:
    install(make_wheel(tmp_path), site)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), *sys.path])}
    command = [sys.executable, "-m", "edge_agent", "plugin"]
    ran = subprocess.run([*command, "digest", "acme.add"], env=environment, capture_output=True, text=True, check=True)
    digest = digest_of_plugin(find_plugin("acme.add"))
    assert ran.stdout == f"{digest}\n"
    ran = subprocess.run([*command, "list"], env=environment, capture_output=True, text=True, check=True)
    assert f"acme.add 1.0 {digest}\n" in ran.stdout
    assert "edgeferry.top_k 1 built in\n" in ran.stdout
    ran = subprocess.run(
        [*command, "digest", "acme.none"], env=environment, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, "there is no plug-in 'acme.none'" in ran.stderr) == (1, True)


def test_code_that_is_not_the_release_s_is_never_imported(tmp_path: Path, site: Path) -> None:
    install(make_wheel(tmp_path, top="raise AssertionError('imported')\n"), site)
    with pytest.raises(PluginMissing, match="is installed with other code"):
        code_of(step(code=code_digest([])))
    wanted = step()
    with (site / "acme_add/steps.py").open("a") as file:
        file.write("# changed after the release was published\n")
    with pytest.raises(PluginMissing, match="is installed with other code"):
        code_of(wanted)
    assert "acme_add" not in sys.modules


def test_one_of_several_builds_of_a_plugin_will_do(tmp_path: Path, site: Path) -> None:
    install(make_wheel(tmp_path), site)
    code = digest_of_plugin(find_plugin("acme.add"))
    check_installed(PipelineStep(plugin="acme.add", version="1.0", code=(code_digest([]), code)))


def test_another_version_or_none_is_said_so_and_installing_it_mends_it(tmp_path: Path, site: Path) -> None:
    with pytest.raises(PluginMissing, match=r"no plug-in .acme.add..*pip install"):
        check_installed(PipelineStep(plugin="acme.add", version="1.0", code=(code_digest([]),)))
    install(make_wheel(tmp_path), site)
    with pytest.raises(PluginMissing, match=r"needs version 1\.1, installed is 1\.0"):
        check_installed(step(version="1.1"))
    check_installed(step())


def test_a_process_that_has_imported_a_plugin_does_not_run_old_code_for_new(tmp_path: Path, site: Path) -> None:
    install(make_wheel(tmp_path), site)
    code_of(step())
    old = step()
    install(make_wheel(tmp_path, body="return {}"), site)
    with pytest.raises(PluginMissing, match="restart the agent"):
        code_of(step())
    with pytest.raises(PluginMissing, match="other code"):
        code_of(old)


def test_two_distributions_with_one_name_are_refused(tmp_path: Path, site: Path) -> None:
    install(make_wheel(tmp_path), site)
    install(make_wheel(tmp_path, name="acme-other"), site)
    with pytest.raises(PluginMissing, match="both bring a plug-in"):
        check_installed(PipelineStep(plugin="acme.add", version="1.0", code=(code_digest([]),)))


def test_a_module_that_hides_the_plugin_is_found_out(
    tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(make_wheel(tmp_path), site)
    wanted = step()
    hiding = tmp_path / "first"
    (hiding / "acme_add").mkdir(parents=True)
    (hiding / "acme_add" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(hiding))
    with pytest.raises(PluginMissing, match="which acme-add did not install"):
        code_of(wanted)


def test_what_a_plugin_lacks_is_no_verdict(tmp_path: Path, site: Path) -> None:
    install(make_wheel(tmp_path, top="import acme_not_there\n"), site)
    with pytest.raises(PluginMissing, match="acme_not_there"):
        open_chain([step()], X, code_of, Guard())


def test_an_agents_own_step_cannot_be_replaced(tmp_path: Path, site: Path) -> None:
    wheel = make_wheel(tmp_path)
    install(wheel, site)
    entry = site / "acme_add-1.0.dist-info/entry_points.txt"
    entry.write_text(entry.read_text().replace("acme.add", "edgeferry.top_k"))
    assert plugins() == []
    with pytest.raises(PluginMissing, match="this agent has no version 2 of it"):
        check_installed(PipelineStep(plugin="edgeferry.top_k", version="2"))


def test_a_plugin_that_cannot_be_imported_for_its_own_fault_fails_the_step(tmp_path: Path, site: Path) -> None:
    install(make_wheel(tmp_path, top="1 / 0\n"), site)
    with pytest.raises(StepFailed, match="ZeroDivisionError"):
        open_chain([step()], X, code_of, Guard())
