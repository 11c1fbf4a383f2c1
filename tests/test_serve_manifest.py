"""docs/serve.yaml and the Dockerfile: that they fit together, and name flags and paths that there are."""

import pathlib
import re

import yaml

ROOT = pathlib.Path(__file__).parents[1]
# Read and not imported: two commands have flags of the same names.
COMMAND = (ROOT / "kangaroo_jax" / "cli" / "serve.py").read_text()


def manifest():
    deployment, service = yaml.safe_load_all((ROOT / "docs" / "serve.yaml").read_text())
    return deployment, service


def test_the_service_reaches_the_deployments_pods():
    deployment, service = manifest()
    assert (deployment["apiVersion"], deployment["kind"]) == ("apps/v1", "Deployment")
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    template = deployment["spec"]["template"]
    assert (
        deployment["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"] == service["spec"]["selector"]
    )
    (container,) = template["spec"]["containers"]
    (port,) = container["ports"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    assert f'DEFINE_integer("port", {port["containerPort"]},' in COMMAND
    assert f"EXPOSE {port['containerPort']}" in (ROOT / "Dockerfile").read_text()
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in template["spec"]["volumes"]}
    assert container["resources"]["limits"] == container["resources"]["requests"]


def test_probes_and_flags_are_ones_that_the_server_has():
    pod = manifest()[0]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    app = (ROOT / "kangaroo_jax" / "serve" / "app.py").read_text()
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert f'Route("{container[name]["httpGet"]["path"]}"' in app
        assert container[name]["httpGet"]["port"] == container["ports"][0]["name"]
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in container["args"])
    assert set(flags) <= set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', COMMAND))
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert all(flags[name].startswith(tuple(mounts)) for name in ("model", "adapter", "api_key_file"))
    wait = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > wait + float(flags["grace"])


def test_the_image_installs_what_there_is():
    text = (ROOT / "Dockerfile").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    for extras in re.findall(r"EXTRAS=(\S+)", text):
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE)
    assert 'kangaroo-serve = "kangaroo_jax.cli.serve:main"' in project
    for source in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split())
