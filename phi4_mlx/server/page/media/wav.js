/** WAV files of one channel with 16 bits a sample. */

const HEAD = 44; // bytes

/**
 * Samples as a WAV file.
 * @param {Float32Array} samples from -1 to 1
 * @param {number} rate in Hz
 * @returns {Blob}
 */
export function wavOf(samples, rate) {
  const view = new DataView(new ArrayBuffer(HEAD + 2 * samples.length));
  const text = (at, letters) => Array.from(letters, (it, i) => view.setUint8(at + i, it.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, HEAD - 8 + 2 * samples.length, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); // bytes of the format
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true); // channels
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true); // bytes a second
  view.setUint16(32, 2, true); // bytes of a sample of all channels
  view.setUint16(34, 16, true); // bits
  text(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((it, i) => view.setInt16(HEAD + 2 * i, Math.round(32_767 * Math.max(-1, Math.min(1, it))), true));
  return new Blob([view.buffer], { type: "audio/wav" });
}

/**
 * The mean of all channels of a sound.
 * @param {AudioBuffer} sound
 * @returns {Float32Array}
 */
export function monoOf(sound) {
  const channels = Array.from({ length: sound.numberOfChannels }, (_, i) => sound.getChannelData(i));
  if (channels.length === 1) return channels[0];
  return channels[0].map((_, i) => channels.reduce((sum, it) => sum + it[i], 0) / channels.length);
}
