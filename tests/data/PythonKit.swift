// The part of PythonKit's interface that examples/bridge.swift uses, for a type check without the package.
// Source: github.com/pvieito/PythonKit, PythonKit/Python.swift.

public protocol PythonConvertible {
    var pythonObject: PythonObject { get }
}

public protocol ConvertibleFromPython {
    init?(_ object: PythonObject)
}

@dynamicCallable
@dynamicMemberLookup
public struct PythonObject: PythonConvertible, CustomStringConvertible {
    public var pythonObject: PythonObject { self }
    public var description: String { "" }

    public subscript(dynamicMember name: String) -> PythonObject {
        get { self }
        nonmutating set {}
    }

    public subscript(key: PythonConvertible...) -> PythonObject {
        get { self }
        nonmutating set {}
    }

    @discardableResult
    public func dynamicallyCall(withArguments arguments: [PythonConvertible] = []) -> PythonObject { self }

    @discardableResult
    public func dynamicallyCall(
        withKeywordArguments arguments: KeyValuePairs<String, PythonConvertible> = [:]
    ) -> PythonObject { self }
}

@dynamicMemberLookup
public struct PythonInterface {
    public func `import`(_ name: String) -> PythonObject { PythonObject() }
    public subscript(dynamicMember name: String) -> PythonObject { PythonObject() }
}

public let Python = PythonInterface()

extension String: PythonConvertible, ConvertibleFromPython {
    public init?(_ object: PythonObject) { return nil }
    public var pythonObject: PythonObject { PythonObject() }
}

extension Int: PythonConvertible, ConvertibleFromPython {
    public init?(_ object: PythonObject) { return nil }
    public var pythonObject: PythonObject { PythonObject() }
}

extension Double: PythonConvertible, ConvertibleFromPython {
    public init?(_ object: PythonObject) { return nil }
    public var pythonObject: PythonObject { PythonObject() }
}

extension Array: PythonConvertible where Element: PythonConvertible {
    public var pythonObject: PythonObject { PythonObject() }
}

extension Dictionary: PythonConvertible where Key: PythonConvertible, Value: PythonConvertible {
    public var pythonObject: PythonObject { PythonObject() }
}
