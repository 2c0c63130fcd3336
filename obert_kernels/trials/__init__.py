"""Many prunings of one model: grids, their outcomes and tables; knows no texts."""
