// Two ways to use the model from Swift: in this process through PythonKit, or in a subprocess over JSON Lines.
//
// PythonKit needs the Python environment of phi4_mlx: set PYTHON_LIBRARY to its libpython and PYTHONPATH to its
// site-packages and the checkout. Under the Hardened Runtime, library validation must be off. The subprocess needs
// neither.
//
// This file was not compiled by its authors, who had no Swift compiler. Where there is one, tests/e2e/test_swift.py
// checks its types against PythonKit's interface.

import Foundation
import PythonKit

// Call Python from one thread only: PythonKit does not take the GIL. The bridge never raises, because PythonKit could
// not catch it; errors are events.
func inProcess() {
    let bridge = Python.import("phi4_mlx.bridge")
    let loaded = bridge.load("demo")
    guard String(loaded["event"]) == "finish" else { return print(loaded["message"]) }
    let messages = [["role": "user", "content": "hello"]]
    let stream = bridge.start_chat(loaded["model"], messages, max_tokens: 60)
    reading: while true {
        let event = bridge.next_event(stream, timeout_s: 0.1)  // "wait" after 0.1 s, so that it can cancel
        switch String(event["event"])! {
        case "token": print(String(event["text"])!, terminator: "")
        case "wait": if Task.isCancelled { bridge.cancel(stream) }
        case "error": print(event["message"]); break reading
        case "finish": print("\n\(event["reason"])"); break reading
        default: break
        }
    }
    // Requests that are awkward to build from Python values can be sent as JSON.
    let request = #"{"model": \#(loaded["model"]), "messages": [{"role": "user", "content": "hi"}]}"#
    print(bridge.chat_json(request))
    bridge.unload(loaded["model"])
}

struct Event: Decodable {
    let id: Int?
    let event: String
    let text: String?
    let reason: String?
    let message: String?  // of an "error"; in a "finish" it is an object, which `try?` skips

    enum CodingKeys: CodingKey { case id, event, text, reason, message }
    init(from decoder: Decoder) throws {
        let fields = try decoder.container(keyedBy: CodingKeys.self)
        id = try? fields.decode(Int.self, forKey: .id)
        event = try fields.decode(String.self, forKey: .event)
        text = try? fields.decode(String.self, forKey: .text)
        reason = try? fields.decode(String.self, forKey: .reason)
        message = try? fields.decode(String.self, forKey: .message)
    }
}

func ownProcess(python: String) throws {
    let process = Process()
    let input = Pipe()
    let output = Pipe()
    process.executableURL = URL(fileURLWithPath: python)
    process.arguments = ["-m", "phi4_mlx.bridge", "--jsonl", "--model", "demo"]
    process.standardInput = input
    process.standardOutput = output
    try process.run()
    func send(_ line: String) { input.fileHandleForWriting.write(Data((line + "\n").utf8)) }
    send(#"{"id": 1, "do": "chat", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 60}"#)
    var pending = Data()
    reading: while true {
        let data = output.fileHandleForReading.availableData  // waits; empty at the end of the output
        if data.isEmpty { break }
        pending.append(data)
        while let end = pending.firstIndex(of: UInt8(ascii: "\n")) {
            let event = try JSONDecoder().decode(Event.self, from: Data(pending[..<end]))
            pending = Data(pending[pending.index(after: end)...])
            switch event.event {
            case "token": print(event.text ?? "", terminator: "")  // send(#"{"cancel": 1}"#) ends it
            case "error": print(event.message ?? ""); break reading
            case "finish": print("\n\(event.reason ?? "")"); break reading
            default: break
            }
        }
    }
    try input.fileHandleForWriting.close()  // the process exits at the end of its input
    process.waitUntilExit()
}

inProcess()
try ownProcess(python: CommandLine.arguments.dropFirst().first ?? "/usr/bin/python3")
