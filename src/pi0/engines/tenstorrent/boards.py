"""Boards that can be simulated without hardware, as TTNN wants them described.

Only what follows from the description is used: the architecture, the grid of cores and the banks of
DRAM. Coordinates, ids and buses are those of any board.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pi0.checkpoint.outputs import replacing
from pi0.errors import EngineError

WORMHOLE = """\
arch:
  0: wormhole_b0
chips:
  0: [0, 0, 0, 0]
chips_with_mmio:
  - 0: 0
ethernet_connections: []
harvesting:
  0: {{noc_translation: true, harvest_mask: {harvest_mask}, dram_harvesting_mask: 0,
      eth_harvesting_mask: 0, pcie_harvesting_mask: 0}}
boards:
  - [{{board_id: 72059269368820857}}, {{board_type: {board_type}}}, {{chips: [0]}}]
"""
BLACKHOLE = """\
arch:
  0: blackhole
chips: {{}}
chip_unique_ids:
  0: 1
chips_with_mmio:
  - 0: 0
ethernet_connections: []
ethernet_connections_to_remote_devices: []
io_device_type: PCIe
harvesting:
  0: {{noc_translation: true, harvest_mask: {harvest_mask}, dram_harvesting_mask: 0,
      eth_harvesting_mask: 288, pcie_harvesting_mask: 2, l2cpu_harvesting_mask: 0}}
chip_to_bus_id:
  0: "0x01"
chip_pci_bdfs:
  0: "0000:01:00.0"
asic_locations:
  0: 0
boards:
  - [{{board_id: 4402341478400}}, {{board_type: {board_type}}}, {{chips: [0]}}]
"""


@dataclass(frozen=True)
class Board:
    """One chip, and how it is described.

    Attributes:
        harvest_mask: lines of cores that are switched off, a bit each: rows on Wormhole, columns on
            Blackhole.
    """

    name: str
    board_type: str
    template: str
    harvest_mask: int

    def write(self, folder: Path) -> Path:
        """Writes the description; returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.yaml"
        with replacing(path) as temporary:
            text = self.template.format(board_type=self.board_type, harvest_mask=self.harvest_mask)
            temporary.write_text(text, encoding="utf-8")
        return path


BOARDS = {
    board.name: board
    for board in (
        Board("n150", "n150", WORMHOLE, 1),
        # One chip of an n300 by itself, a row of whose cores dispatches.
        Board("n300", "n150", WORMHOLE, 3),
        # Two columns are off since firmware 19.5 (tt-metal issue 47014, tt-umd pull request 1942).
        Board("p150", "p150", BLACKHOLE, 3),
        # With older firmware.
        Board("p150-13x10", "p150", BLACKHOLE, 0),
        # As an n300 opens: Ethernet cores dispatch, and no row of cores. A mock device refuses
        # programs in that row all the same (tt-mlir issue 9235), so there is one more for it.
        Board("n300-8x8", "n150", WORMHOLE, 1),
    )
}


def find_board(name: str) -> Board:
    """Raises EngineError if there is no such board."""
    if name not in BOARDS:
        raise EngineError(f"board: expected one of {', '.join(BOARDS)}, found {name!r}.")
    return BOARDS[name]
