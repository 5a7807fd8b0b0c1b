package netlink

import "encoding/binary"

// Attrs builds a sequence of netlink attributes. Start it with a fixed header (ifinfomsg, nfgenmsg) where the message has one.
type Attrs []byte

// Bytes adds an attribute with raw content.
func (a Attrs) Bytes(typ uint16, b []byte) Attrs {
	a = binary.NativeEndian.AppendUint16(a, uint16(4+len(b)))
	a = binary.NativeEndian.AppendUint16(a, typ)
	a = append(a, b...)
	return Attrs(pad(a))
}

// String adds an attribute with a zero-terminated string.
func (a Attrs) String(typ uint16, s string) Attrs { return a.Bytes(typ, append([]byte(s), 0)) }

// Uint32 adds a number in the machine's byte order, as rtnetlink wants it.
func (a Attrs) Uint32(typ uint16, v uint32) Attrs {
	return a.Bytes(typ, binary.NativeEndian.AppendUint32(nil, v))
}

// nested is NLA_F_NESTED.
const nested = 1 << 15

// Nest adds an attribute that holds others.
func (a Attrs) Nest(typ uint16, inner Attrs) Attrs { return a.Bytes(typ|nested, inner) }

// Parse reads a sequence of attributes into a map by type. Of attributes that repeat, the last stays; what is malformed ends
// the reading.
func Parse(b []byte) map[uint16][]byte {
	m := make(map[uint16][]byte)
	Each(b, func(typ uint16, data []byte) { m[typ] = data })
	return m
}

// Each calls fn for every attribute in b, in order, with the flag bits removed from its type.
func Each(b []byte, fn func(typ uint16, data []byte)) {
	for len(b) >= 4 {
		l := int(binary.NativeEndian.Uint16(b))
		if l < 4 || l > len(b) {
			return
		}
		fn(binary.NativeEndian.Uint16(b[2:])&0x3fff, b[4:l])
		b = b[min((l+3)&^3, len(b)):]
	}
}
