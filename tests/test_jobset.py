"""docs/jobset.yaml: what JobSet's and Kubernetes' schemas demand of it, and that it asks for the slice it names."""

import pathlib
import re

import yaml

from tests.train.runs import configured

ROOT = pathlib.Path(__file__).parents[1]
CHIPS_PER_HOST = 4  # of ct5lp-hightpu-4t, which multi-host v5e slices are made of


def test_the_manifest_is_a_jobset_that_fills_its_slice():
    jobset = yaml.safe_load((ROOT / "docs" / "jobset.yaml").read_text())
    assert set(jobset) == {"apiVersion", "kind", "metadata", "spec"}
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,40}[a-z0-9])?", jobset["metadata"]["name"])
    assert set(jobset["spec"]) <= {"replicatedJobs", "failurePolicy", "successPolicy", "network", "startupPolicy"}
    assert isinstance(jobset["spec"]["failurePolicy"]["maxRestarts"], int)
    (job,) = jobset["spec"]["replicatedJobs"]
    assert set(job) == {"name", "replicas", "template"}
    spec = job["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["backoffLimit"] == 0
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] in ("Never", "OnFailure")  # all that a Job's pods may have
    (container,) = pod["containers"]
    limits = container["resources"]["limits"]
    assert limits == container["resources"]["requests"] == {"google.com/tpu": CHIPS_PER_HOST}
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert spec["parallelism"] == spec["completions"] == rows * columns // CHIPS_PER_HOST
    assert "volumes" not in pod
    assert pod["serviceAccountName"] in (ROOT / "docs" / "distributed.md").read_text()
    ports = [port["containerPort"] for port in container["ports"]]
    assert len(set(ports)) == len(ports)


def test_its_command_is_one_that_train_py_takes():
    container = yaml.safe_load((ROOT / "docs" / "jobset.yaml").read_text())
    pod = container["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    words = pod["containers"][0]["command"] + pod["containers"][0]["args"]
    assert words[:3] == ["python", "-u", "train.py"]
    options = dict(word.split("=", 1) for word in words[3:])
    assert (ROOT / options.pop("--config")).is_file()
    # Everything else overrides a setting that there is, in the bucket that all pods see.
    assert set(options) == {"--config.target", "--config.data.files", "--config.output"}
    assert all(value.startswith("gs://BUCKET/") for value in options.values())
    settings = {name.removeprefix("--config."): value for name, value in options.items()}
    assert configured(settings).output == settings["output"]
