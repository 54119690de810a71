/** Sends the samples of the microphone to the page, one channel, in the audio thread's own blocks. */

class Microphone extends AudioWorkletProcessor {
  process([channels]) {
    if (channels.length) this.port.postMessage(channels[0].slice());
    return true;
  }
}

registerProcessor("microphone", Microphone);
