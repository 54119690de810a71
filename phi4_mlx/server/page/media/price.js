/** The price of a picture or a sound in tokens, by the rules of `image_tokens` and `read_audio` in Python. */

const PATCH = 14; // pixels of a patch's side
const POOLED = 2; // patches of a side that the pooling makes one
const LEAST_SIDE = 10; // pixels
const RATE = 16_000; // Hz of sound for the model
const WINDOW = 400; // samples of a frame
const HOP = 160; // samples from one frame to the next
const FRAMES = 8; // a token

/** @typedef {{crop_size: number, max_crops: number}} Settings of the model's pictures */

/** The [columns, rows] nearest in shape; among those of one shape the largest that the picture half fills. */
function nearestGrid(width, height, crop, most) {
  const grids = [];
  for (let i = 1; i <= most; i++) for (let j = 1; i * j <= most; j++) grids.push([i, j]);
  grids.sort((a, b) => a[0] * a[1] - b[0] * b[1]);
  let best = [1, 1];
  let least = Infinity;
  for (const [i, j] of grids) {
    const difference = Math.abs(width / height - i / j);
    if (difference < least || (difference === least && width * height > 0.5 * crop * crop * i * j)) {
      [best, least] = [[i, j], difference];
    }
  }
  return best;
}

/** Patches of a side that hold some of the picture. */
const validPatches = (whole, inside) => Math.floor(whole / PATCH) - Math.floor((whole - inside) / PATCH);

/**
 * Tokens of a picture.
 * @param {number} width in pixels, upright
 * @param {number} height in pixels
 * @param {Settings} settings
 * @returns {number} 0 if the picture is too narrow for the model
 */
export function imageTokens(width, height, { crop_size: crop, max_crops: most }) {
  let [columns, rows] = [Math.ceil(width / crop), Math.ceil(height / crop)];
  if (columns * rows > most) [columns, rows] = nearestGrid(width, height, crop, most);
  const [across, down] = [crop * columns, crop * rows];
  const [byWidth, byHeight] = [across / width, down / height]; // floats, then whole pixels, as the reference does
  const narrower = byWidth < byHeight;
  const inside = narrower ? [across, Math.trunc(height * byWidth)] : [Math.trunc(width * byHeight), down];
  if (Math.min(...inside) < LEAST_SIDE) return 0;
  const pooled = (whole, part) => Math.ceil(validPatches(whole, part) / POOLED);
  const side = Math.floor(Math.floor(crop / PATCH) / POOLED);
  return pooled(down, inside[1]) * (pooled(across, inside[0]) + 1) + 1 + side * (side + 1);
}

/**
 * Tokens of a sound.
 * @param {number} seconds
 * @returns {number} 0 if it is shorter than a frame
 */
export function audioTokens(seconds) {
  const frames = Math.floor((Math.round(seconds * RATE) - WINDOW) / HOP) + 1;
  return Math.max(0, Math.ceil(frames / FRAMES));
}
