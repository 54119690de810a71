/** The recorder: the microphone's sound as a WAV file of 16 kHz, made in the page. */
import { wavOf } from "./wav.js";

const RATE = 16_000; // Hz, the model's
const LONGEST_S = 300;
const WORKLET = new URL("./recorder_worklet.js", import.meta.url).href;

/** The reason why the page cannot record; "" if it can. A browser gives the microphone to secure pages alone. */
export const obstacle = () => {
  if (!window.isSecureContext) return "A browser gives the microphone only to this machine's own pages and to https.";
  return navigator.mediaDevices?.getUserMedia && window.AudioWorkletNode ? "" : "This browser cannot record.";
};

/** One recording. */
export class Recording {
  /** @type {Float32Array[]} */
  #blocks = [];
  #length = 0;
  #context = null;
  #stream = null;

  /** Seconds so far. */
  get seconds() {
    return this.#context ? this.#length / this.#context.sampleRate : 0;
  }

  /**
   * Asks for the microphone and begins.
   * @param {() => void} grown called for each block
   * @param {() => void} full called once it is as long as it may be
   * @throws {Error} the user or the browser refuses; the message is for the user
   */
  async start(grown, full) {
    try {
      this.#stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
    } catch (error) {
      throw new Error(`There is no microphone for this page: ${error.message}`);
    }
    this.#context = new AudioContext();
    await this.#context.audioWorklet.addModule(WORKLET);
    const microphone = new AudioWorkletNode(this.#context, "microphone", { numberOfOutputs: 0 });
    microphone.port.onmessage = ({ data }) => {
      if (this.seconds >= LONGEST_S) return full();
      this.#blocks.push(data);
      this.#length += data.length;
      grown();
    };
    this.#context.createMediaStreamSource(this.#stream).connect(microphone);
  }

  /**
   * Ends the recording.
   * @returns {Promise<File | null>} null if nothing was recorded
   */
  async stop() {
    this.#stream?.getTracks().forEach((track) => track.stop());
    const rate = this.#context?.sampleRate;
    await this.#context?.close();
    if (!this.#length) return null;
    const samples = new Float32Array(this.#length);
    let at = 0;
    for (const block of this.#blocks) {
      samples.set(block, at);
      at += block.length;
    }
    return new File([wavOf(await resampled(samples, rate), RATE)], "recording.wav", { type: "audio/wav" });
  }
}

/** The samples at the model's rate; the browser filters them. */
async function resampled(samples, rate) {
  if (rate === RATE) return samples;
  const context = new OfflineAudioContext(1, Math.ceil((samples.length * RATE) / rate), RATE);
  const buffer = context.createBuffer(1, samples.length, rate);
  buffer.copyToChannel(samples, 0);
  const source = new AudioBufferSourceNode(context, { buffer });
  source.connect(context.destination);
  source.start();
  return (await context.startRendering()).getChannelData(0);
}
