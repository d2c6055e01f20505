import pytest
import torch

from pipeline.backbones import LoadedWeights, list_backbones, load_weights


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def seeded_weights():
    """Weights of each backbone by name, drawn when first asked for."""
    drawn: dict[str, LoadedWeights] = {}

    def draw(name: str) -> LoadedWeights:
        if name not in drawn:
            drawn[name] = load_weights(name, "random:7")
        return drawn[name]

    return draw


@pytest.fixture(params=list_backbones())
def name(request):
    return request.param


@pytest.fixture
def state_dict(seeded_weights):
    """Weights of fbnetv3_b, to be changed at will."""
    return dict(seeded_weights("fbnetv3_b.ra2_in1k").state_dict)
