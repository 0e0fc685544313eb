"""Every route has the API category by which it can be restricted; a new one cannot be forgotten."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from doorstep.config.cloud import Clouds
from doorstep.errors import InvalidArgument
from doorstep.protocols import kserve, openai
from doorstep.protocols.clouds.sagemaker import SageMakerFront
from doorstep.protocols.clouds.sagemaker_models import _PATH, _lay_out
from doorstep.protocols.clouds.vertex_ai import REDIRECTS
from doorstep.protocols.kserve.categories import category_of
from doorstep.testing.fakes import fake_server
from doorstep.wire.grpc import GrpcServer
from doorstep.wire.limits import WireLimits
from doorstep.wire.router import Router


def patterns(router: Router) -> list[str]:
    return [*router._static, *router._routes]


def test_every_route_has_a_category() -> None:
    async def routes() -> list[str]:
        server, _ = await fake_server()
        front, own = Router(), Router()
        grpc = GrpcServer()
        kserve.register(own, grpc, server, WireLimits())
        openai.register(own, server, WireLimits(), ping_s=0)
        grpc.install(own)
        SageMakerFront(server, WireLimits(), Clouds()).register(front)
        return [*patterns(own), *patterns(front)]

    found = asyncio.run(routes())
    assert {"/ping", "/v2/models/{name}/generate_stream", "/v2/logging"} <= set(found)
    assert [route for route in found if category_of(route) is None] == []


def test_vertex_ais_redirects_lead_to_routes_with_a_category() -> None:
    assert [route for route in REDIRECTS if category_of(route) is None] == ["/metrics"]  # as on its own listener


# Where SageMaker's models lie


def lay_out(root: Path, url: str, target: str) -> tuple[Path, str]:
    return _lay_out(re.compile(_PATH.format(root=re.escape(str(root)))), url, target)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    for model, config in (("step", 'name: "step"\nbackend: "x"'), ("whole", 'name:"whole" platform: "ensemble"')):
        folder = tmp_path / "abc" / "model" / model
        (folder / "1").mkdir(parents=True)
        (folder / "config.pbtxt").write_text(config)
    return tmp_path


def test_the_ensemble_of_an_archive_is_served_under_the_targets_name(archive: Path) -> None:
    place, repository = lay_out(archive, f"{archive}/abc/model", "target.tar.gz")
    assert repository == f"{archive}/abc/model"
    assert sorted(p.name for p in place.iterdir()) == ["step", "target.tar.gz"]
    assert (place / "target.tar.gz" / "config.pbtxt").read_text().strip() == 'platform: "ensemble"'
    assert (place / "target.tar.gz" / "1").is_symlink()
    assert "step" in (place / "step" / "config.pbtxt").read_text()


def test_a_model_that_is_the_archive_itself_is_served_alone(archive: Path) -> None:
    (archive / "abc" / "model" / "config.pbtxt").write_text('name: "any"\nmax_batch_size: 1')
    place, repository = lay_out(archive, f"{archive}/abc/model/", "t")
    assert repository == f"{archive}/abc"
    assert [p.name for p in place.iterdir()] == ["t"]
    assert (place / "t" / "config.pbtxt").read_text().strip() == "max_batch_size: 1"


@pytest.mark.parametrize(
    ("path", "target"), [("abc/model/../../..", "t"), ("abc", "t"), ("abc/model", "../t"), ("x/model", "t")]
)
def test_what_is_elsewhere_is_refused(archive: Path, path: str, target: str) -> None:
    with pytest.raises(InvalidArgument):
        lay_out(archive, f"{archive}/{path}", target)
