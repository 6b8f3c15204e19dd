// A black canvas to draw on with a white brush, or with one of another colour.
element.innerHTML = `<canvas width="280" height="${Math.round((280 * props.height) / props.width)}" aria-label="Draw here"></canvas>
  <div>${props.color ? '<label>Brush <input type="color" value="#ffffff"></label>' : ""}
  <button data-do="submit">Use the drawing</button><button data-do="clear">Clear</button></div>`;
const canvas = element.querySelector("canvas"), pen = canvas.getContext("2d");
const color = element.querySelector("input");
const clear = () => {
  pen.fillStyle = "black";
  pen.fillRect(0, 0, canvas.width, canvas.height);
};
const at = (event) => {
  const box = canvas.getBoundingClientRect(), scale = canvas.width / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
};
clear();
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  Object.assign(pen, { strokeStyle: color ? color.value : "white", lineWidth: 22, lineCap: "round", lineJoin: "round" });
  pen.beginPath();
  pen.moveTo(...at(event));
  pen.lineTo(...at(event));
  pen.stroke();
});
canvas.addEventListener("pointermove", (event) => {
  if (!event.buttons) return;
  pen.lineTo(...at(event));
  pen.stroke();
});
element.addEventListener("click", (event) => {
  const action = event.target.dataset.do;
  if (action === "clear") clear();
  if (action === "submit") trigger("submit", { image: canvas.toDataURL().split(",")[1] });
});
