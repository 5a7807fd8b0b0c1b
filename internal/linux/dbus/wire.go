package dbus

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Kinds of messages.
const (
	kindCall   = 1
	kindReturn = 2
	kindError  = 3
	kindSignal = 4
)

// Fields of a message's header.
const (
	fieldPath        = 1
	fieldInterface   = 2
	fieldMember      = 3
	fieldErrorName   = 4
	fieldReplySerial = 5
	fieldDestination = 6
	fieldSignature   = 8
)

// maxMessage bounds what is taken in, header and body each; the protocol would allow 128 MB.
const maxMessage = 1 << 20

var errFormat = errors.New("D-Bus message is damaged")

type message struct {
	kind                      byte
	order                     binary.ByteOrder
	serial, replyTo           uint32
	path, iface, member, dest string
	errorName, signature      string
	body                      []byte
}

func (m *message) reader() *Reader { return &Reader{b: m.body, order: m.order} }

func (m *message) public() *Message {
	return &Message{Path: m.path, Interface: m.iface, Member: m.member, Body: m.reader()}
}

// encode writes the message in little endian.
func (m *message) encode() []byte {
	h := &Body{}
	h.b = append(h.b, 'l', m.kind, 0, 1)
	h.b = binary.LittleEndian.AppendUint32(h.b, uint32(len(m.body)))
	h.b = binary.LittleEndian.AppendUint32(h.b, m.serial)
	h.array(8, func() {
		field := func(id byte, signature, value string) {
			if value == "" {
				return
			}
			h.align(8)
			h.b = append(h.b, id)
			h.sig(signature)
			if signature == "g" {
				h.sig(value)
			} else {
				h.str(value)
			}
		}
		field(fieldPath, "o", m.path)
		field(fieldInterface, "s", m.iface)
		field(fieldMember, "s", m.member)
		field(fieldErrorName, "s", m.errorName)
		field(fieldDestination, "s", m.dest)
		field(fieldSignature, "g", m.signature)
		if m.replyTo != 0 {
			h.align(8)
			h.b = append(h.b, fieldReplySerial)
			h.sig("u")
			h.u32(m.replyTo)
		}
	})
	h.align(8)
	return append(h.b, m.body...)
}

// readMessage reads one message.
func readMessage(r io.Reader) (*message, error) {
	var fixed [16]byte
	if _, err := io.ReadFull(r, fixed[:]); err != nil {
		return nil, err
	}
	m := &message{kind: fixed[1], order: binary.LittleEndian}
	switch fixed[0] {
	case 'l':
	case 'B':
		m.order = binary.BigEndian
	default:
		return nil, errFormat
	}
	bodyLen, fieldsLen := m.order.Uint32(fixed[4:]), m.order.Uint32(fixed[12:])
	m.serial = m.order.Uint32(fixed[8:])
	if bodyLen > maxMessage || fieldsLen > maxMessage {
		return nil, fmt.Errorf("D-Bus message of %d bytes is too long", uint64(bodyLen)+uint64(fieldsLen))
	}
	// The fields end where they end, the body begins at a multiple of eight.
	rest := make([]byte, (fieldsLen+7)/8*8+bodyLen)
	if _, err := io.ReadFull(r, rest); err != nil {
		return nil, err
	}
	m.body = rest[uint32(len(rest))-bodyLen:]
	d := &Reader{b: append(fixed[:], rest[:fieldsLen]...), pos: len(fixed), order: m.order}
	for d.pos < len(d.b) && d.err == nil {
		d.align(8)
		id := d.byte()
		switch signature := d.sig(); {
		case signature == "u":
			if n := d.Uint32(); id == fieldReplySerial {
				m.replyTo = n
			}
		case signature == "g":
			if s := d.sig(); id == fieldSignature {
				m.signature = s
			}
		case signature == "s" || signature == "o":
			s := d.String()
			switch id {
			case fieldPath:
				m.path = s
			case fieldInterface:
				m.iface = s
			case fieldMember:
				m.member = s
			case fieldErrorName:
				m.errorName = s
			case fieldDestination:
				m.dest = s
			}
		default:
			return nil, errFormat
		}
	}
	return m, d.err
}

// Body is a message's content while it is written. The zero value is empty.
type Body struct {
	signature string
	b         []byte
}

func (w *Body) align(n int) {
	for len(w.b)%n != 0 {
		w.b = append(w.b, 0)
	}
}

func (w *Body) u32(n uint32) {
	w.align(4)
	w.b = binary.LittleEndian.AppendUint32(w.b, n)
}

func (w *Body) str(s string) {
	w.u32(uint32(len(s)))
	w.b = append(append(w.b, s...), 0)
}

func (w *Body) sig(s string) {
	w.b = append(w.b, byte(len(s)))
	w.b = append(append(w.b, s...), 0)
}

// array writes an array whose elements are aligned to n. The padding before the first one does not count.
func (w *Body) array(n int, elements func()) {
	w.u32(0)
	at := len(w.b)
	w.align(n)
	start := len(w.b)
	elements()
	binary.LittleEndian.PutUint32(w.b[at-4:], uint32(len(w.b)-start))
}

// String appends a string.
func (w *Body) String(s string) *Body {
	w.signature += "s"
	w.str(s)
	return w
}

// Bool appends a truth value.
func (w *Body) Bool(v bool) *Body {
	w.signature += "b"
	w.bool(v)
	return w
}

func (w *Body) bool(v bool) {
	n := uint32(0)
	if v {
		n = 1
	}
	w.u32(n)
}

// Property is a name with a value: a string, bool, uint32, uint64, []string, []uint32 or []byte.
type Property struct {
	Name  string
	Value any
}

// Properties appends a list of names and values, a(sv).
func (w *Body) Properties(list []Property) *Body {
	w.signature += "a(sv)"
	w.array(8, func() {
		for _, p := range list {
			w.align(8)
			w.str(p.Name)
			w.variant(p.Value)
		}
	})
	return w
}

// NoUnits appends the empty list of further units that StartTransientUnit wants, a(sa(sv)).
func (w *Body) NoUnits() *Body {
	w.signature += "a(sa(sv))"
	w.array(8, func() {})
	return w
}

func (w *Body) variant(v any) {
	switch v := v.(type) {
	case string:
		w.sig("s")
		w.str(v)
	case bool:
		w.sig("b")
		w.bool(v)
	case uint32:
		w.sig("u")
		w.u32(v)
	case uint64:
		w.sig("t")
		w.align(8)
		w.b = binary.LittleEndian.AppendUint64(w.b, v)
	case []string:
		w.sig("as")
		w.array(4, func() {
			for _, s := range v {
				w.str(s)
			}
		})
	case []uint32:
		w.sig("au")
		w.array(4, func() {
			for _, n := range v {
				w.u32(n)
			}
		})
	case []byte:
		w.sig("ay")
		w.array(1, func() { w.b = append(w.b, v...) })
	default:
		panic(fmt.Sprintf("dbus: a property is a %T", v)) // a mistake of the programmer
	}
}

// Reader reads a message's content. After the first error everything is empty.
type Reader struct {
	b     []byte
	pos   int
	order binary.ByteOrder
	err   error
}

// Err is what went wrong so far.
func (r *Reader) Err() error { return r.err }

func (r *Reader) take(n int) []byte {
	if r.err != nil || n < 0 || n > len(r.b)-r.pos {
		r.err = errFormat
		return nil
	}
	b := r.b[r.pos : r.pos+n]
	r.pos += n
	return b
}

func (r *Reader) align(n int) { r.take((n - r.pos%n) % n) }

func (r *Reader) byte() byte {
	if b := r.take(1); b != nil {
		return b[0]
	}
	return 0
}

// Uint32 reads a number.
func (r *Reader) Uint32() uint32 {
	r.align(4)
	if b := r.take(4); b != nil {
		return r.order.Uint32(b)
	}
	return 0
}

// String reads a string or an object's path.
func (r *Reader) String() string { return r.text(int(r.Uint32())) }

func (r *Reader) sig() string { return r.text(int(r.byte())) }

func (r *Reader) text(n int) string {
	b := r.take(n)
	if end := r.take(1); b == nil || end == nil || end[0] != 0 || bytes.IndexByte(b, 0) >= 0 {
		r.err = errFormat
		return ""
	}
	return string(b)
}
