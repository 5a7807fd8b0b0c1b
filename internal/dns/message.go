package dns

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"strings"

	"golang.org/x/net/dns/dnsmessage"
)

// Numbers of the protocol that dnsmessage does not name.
const (
	rcodeServerFailure = dnsmessage.RCodeServerFailure

	typeDS, typeRRSIG, typeNSEC, typeDNSKEY, typeNSEC3PARAM = 43, 46, 47, 48, 51
	typeIXFR, typeAXFR                                      = 251, 252

	headerLen = 12
	// The bits of the third and fourth byte of a header.
	bitResponse, bitTruncated, bitRecursionWanted = 0x80, 0x02, 0x01
	bitRecursion, bitCheckingDisabled             = 0x80, 0x10
	opcodeBits, rcodeBits                         = 0x78, 0x0f
)

// query is a question of the container.
type query struct {
	// msg is the whole message, of which the first end bytes are header and question.
	msg []byte
	end int
	// name is the question's, in lower case and without the dot at the end.
	name  string
	typ   dnsmessage.Type
	class dnsmessage.Class
	// edns says that there are options, size how long an answer may be by them, as a datagram; sec asks for signatures.
	edns bool
	size int
	sec  bool

	tcp bool
	// limit is how long the answer may be.
	limit int
}

// clone is a copy that does not share msg.
func (q *query) clone() *query {
	c := *q
	c.msg = bytes.Clone(q.msg)
	return &c
}

// parse reads a message. It returns a query; or the answer to something that is none; or neither, where there is nothing to be
// said: an answer to an answer would go on for ever.
func parse(msg []byte) (*query, []byte) {
	if len(msg) < headerLen || msg[2]&bitResponse != 0 {
		return nil, nil
	}
	refuse := func(rcode dnsmessage.RCode) (*query, []byte) {
		b := make([]byte, headerLen)
		copy(b, msg[:2])
		b[2], b[3] = bitResponse|msg[2]&(opcodeBits|bitRecursionWanted), bitRecursion|byte(rcode)
		return nil, b
	}
	if msg[2]&opcodeBits != 0 {
		return refuse(dnsmessage.RCodeNotImplemented)
	}
	end := questionEnd(msg)
	var p dnsmessage.Parser
	if _, err := p.Start(msg); err != nil || end < 0 {
		return refuse(dnsmessage.RCodeFormatError)
	}
	question, err := p.Question()
	if err != nil {
		return refuse(dnsmessage.RCodeFormatError)
	}
	q := &query{msg: msg, end: end, name: strings.ToLower(strings.TrimSuffix(question.Name.String(), ".")), typ: question.Type, class: question.Class}
	if p.SkipAllQuestions() != nil || p.SkipAllAnswers() != nil || p.SkipAllAuthorities() != nil {
		return refuse(dnsmessage.RCodeFormatError)
	}
	for {
		h, err := p.AdditionalHeader()
		if err == dnsmessage.ErrSectionDone {
			return q, nil
		}
		if err == nil {
			err = p.SkipAdditional()
		}
		if err != nil {
			return refuse(dnsmessage.RCodeFormatError)
		}
		if h.Type == dnsmessage.TypeOPT {
			q.edns, q.size, q.sec = true, int(h.Class), h.DNSSECAllowed()
		}
	}
}

// questionEnd returns where a message's only question ends, -1 if it has not exactly one, or one that points elsewhere.
func questionEnd(msg []byte) int {
	if len(msg) < headerLen || binary.BigEndian.Uint16(msg[4:]) != 1 {
		return -1
	}
	for i := headerLen; i < len(msg); i += 1 + int(msg[i]) {
		if msg[i] == 0 {
			if i+5 > len(msg) {
				return -1
			}
			return i + 5
		}
		if msg[i] > 63 {
			return -1
		}
	}
	return -1
}

// reply begins an answer of ours behind what out holds already: header and question.
func (q *query) reply(out []byte, rcode dnsmessage.RCode) []byte {
	at := len(out)
	out = append(out, q.msg[:q.end]...)
	h := out[at:]
	h[2] = bitResponse | h[2]&(opcodeBits|bitRecursionWanted)
	h[3] = bitRecursion | h[3]&bitCheckingDisabled | byte(rcode)
	clear(h[6:headerLen])
	return out
}

// failure is an answer without records.
func (q *query) failure(out []byte, rcode dnsmessage.RCode) []byte {
	return q.options(q.reply(out, rcode), len(out))
}

// options ends an answer, which begins at at: a query with options gets some back.
func (q *query) options(out []byte, at int) []byte {
	if !q.edns {
		return out
	}
	count(out[at:], 10)
	out = append(out, 0, 0, byte(dnsmessage.TypeOPT), maxQuery>>8, maxQuery&0xff, 0, 0)
	if q.sec {
		out = append(out, 0x80, 0)
	} else {
		out = append(out, 0, 0)
	}
	return append(out, 0, 0)
}

// optionsLen is the length of what options adds.
const optionsLen = 11

// count adds one to the number of records of a section: 6 is where that of answers stands, 8 of authorities, 10 of additional ones.
func count(h []byte, section int) {
	binary.BigEndian.PutUint16(h[section:], binary.BigEndian.Uint16(h[section:])+1)
}

// record adds a record about a name, given in the form of the protocol, to an answer that begins at at. When it has no room any more, the answer is marked as cut off,
// unless the record is only an additional one.
func (q *query) record(out []byte, at, section int, name []byte, typ dnsmessage.Type, data []byte) []byte {
	room := q.limit
	if q.edns {
		room -= optionsLen
	}
	if len(out)-at+len(name)+10+len(data) > room {
		if section == 6 {
			out[at+2] |= bitTruncated
		}
		return out
	}
	count(out[at:], section)
	out = append(out, name...)
	out = append(out, byte(typ>>8), byte(typ), 0, byte(dnsmessage.ClassINET), 0, 0, 0, ttl, byte(len(data)>>8), byte(len(data)))
	return append(out, data...)
}

// questionName stands for the question's name in a record: it follows the header.
var questionName = []byte{0xc0, headerLen}

// addresses adds those of the addresses that are of the type, A or AAAA.
func (q *query) addresses(out []byte, at, section int, name []byte, typ dnsmessage.Type, addrs []netip.Addr) []byte {
	for _, a := range addrs {
		if a.Is4() == (typ == dnsmessage.TypeA) {
			out = q.record(out, at, section, name, typ, a.AsSlice())
		}
	}
	return out
}

// wireName is a name in the form of the protocol; nil for what is no name there.
func wireName(name string) []byte {
	if len(name) > 253 || name == "" {
		return nil
	}
	var b []byte
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 {
			return nil
		}
		b = append(append(b, byte(len(label))), label...)
	}
	return append(b, 0)
}

// answers reports whether msg is an answer to the query whose header and question are asked: number, question and kind agree.
func answers(msg, asked []byte) bool {
	if len(msg) < headerLen || !bytes.Equal(msg[:2], asked[:2]) || msg[2]&bitResponse == 0 || (msg[2]^asked[2])&opcodeBits != 0 {
		return false
	}
	if binary.BigEndian.Uint16(msg[4:]) == 0 {
		return msg[3]&rcodeBits != 0 // a server that did not understand may leave the question out
	}
	end := questionEnd(msg)
	// Letters may have another case. The lengths between them are lower than any letter.
	return end == len(asked) && foldEqual(msg[headerLen:end-4], asked[headerLen:end-4]) && bytes.Equal(msg[end-4:end], asked[end-4:])
}

func foldEqual(a, b []byte) bool {
	if len(a) != len(b) {
		return false
	}
	lower := func(c byte) byte {
		if 'A' <= c && c <= 'Z' {
			c |= 0x20
		}
		return c
	}
	for k := range a {
		if lower(a[k]) != lower(b[k]) {
			return false
		}
	}
	return true
}
