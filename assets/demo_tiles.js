// A grid of buttons: a click sends the button's index, the arrow keys go from one to the next.
let last = null;
element.addEventListener("click", (event) => {
  const tile = event.target.closest("[data-index]");
  if (!tile) return;
  last = tile.dataset.index;
  trigger("select", { index: Number(last) });
});
element.addEventListener("keydown", (event) => {
  const tiles = [...element.querySelectorAll("[data-index]")];
  const columns = tiles.filter((tile) => tile.offsetTop === tiles[0].offsetTop).length;
  const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  const from = tiles.indexOf(event.target), to = tiles[from + move];
  if (from < 0 || !to) return;
  event.preventDefault();
  for (const tile of tiles) tile.tabIndex = tile === to ? 0 : -1;
  to.focus();
});
// New content replaces the button that had the focus.
watch("value", () => {
  if (last !== null && document.activeElement === document.body)
    element.querySelector(`[data-index="${last}"]`)?.focus({ preventScroll: true });
});
