package plainjson

import (
	"bytes"
	"encoding"
	"encoding/json"
	"reflect"
	"slices"
	"strconv"
	"strings"
)

// Marshal is json.Marshal.
func Marshal(v any) ([]byte, error) {
	e := encoder{html: true}
	if e.value(reflect.ValueOf(v), 0) {
		return e.text, nil
	}
	return json.Marshal(v)
}

// MarshalIndent is json.MarshalIndent, without a prefix.
func MarshalIndent(v any, indent string) ([]byte, error) {
	b, err := Marshal(v)
	if err != nil {
		return nil, err
	}
	return indented(b, indent)
}

// Print is what a json.Encoder writes that does not escape HTML, without the end of the line; indented unless indent is empty.
func Print(v any, indent string) ([]byte, error) {
	e := encoder{}
	if !e.value(reflect.ValueOf(v), 0) {
		var err error
		if e.text, err = unescaped(v); err != nil {
			return nil, err
		}
	}
	if indent == "" {
		return e.text, nil
	}
	return indented(e.text, indent)
}

func indented(b []byte, indent string) ([]byte, error) {
	var out bytes.Buffer
	out.Grow(2 * len(b))
	err := json.Indent(&out, b, "", indent)
	return out.Bytes(), err
}

func unescaped(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(v)
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), err
}

type encoder struct {
	text []byte
	html bool // <, > and & are escaped
}

// value appends v's text; false where encoding/json has to have a look at the whole.
func (e *encoder) value(v reflect.Value, depth int) bool {
	if depth > maxDepth {
		return false
	}
	switch v.Kind() {
	case reflect.Invalid:
		e.text = append(e.text, "null"...)
		return true
	case reflect.Pointer, reflect.Interface:
		if v.IsNil() {
			e.text = append(e.text, "null"...)
			return true
		}
		return e.value(v.Elem(), depth+1)
	}
	t := v.Type()
	info := infoOf(t)
	if info.ownText || t == numberType {
		return e.delegate(v)
	}
	switch v.Kind() {
	case reflect.Struct:
		if info.plain {
			return e.structure(v, info.fields, depth)
		}
	case reflect.Map:
		if t.Key().Kind() == reflect.String || t.Key().Implements(toTextType) {
			return e.mapping(v, depth)
		}
	case reflect.Slice:
		if v.IsNil() {
			e.text = append(e.text, "null"...)
			return true
		}
		if t.Elem().Kind() != reflect.Uint8 {
			return e.list(v, depth)
		}
	case reflect.Array:
		return e.list(v, depth)
	case reflect.String:
		return e.str(v.String())
	case reflect.Bool:
		e.text = strconv.AppendBool(e.text, v.Bool())
		return true
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		e.text = strconv.AppendInt(e.text, v.Int(), 10)
		return true
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64, reflect.Uintptr:
		e.text = strconv.AppendUint(e.text, v.Uint(), 10)
		return true
	}
	return e.delegate(v)
}

func (e *encoder) structure(v reflect.Value, fields []field, depth int) bool {
	e.text = append(e.text, '{')
	first := true
	for _, f := range fields {
		m := v.FieldByIndex(f.index)
		if f.omitEmpty && empty(m) {
			continue
		}
		if f.omitZero {
			zero, ok := isZero(m)
			if !ok {
				return false
			}
			if zero {
				continue
			}
		}
		if !first {
			e.text = append(e.text, ',')
		}
		first = false
		e.text = append(append(append(e.text, '"'), f.name...), '"', ':')
		if !e.value(m, depth+1) {
			return false
		}
	}
	e.text = append(e.text, '}')
	return true
}

// empty is what omitempty leaves out.
func empty(v reflect.Value) bool {
	switch v.Kind() {
	case reflect.Array, reflect.Map, reflect.Slice, reflect.String:
		return v.Len() == 0
	case reflect.Struct:
		return false
	}
	return v.IsZero()
}

// isZero is what omitzero leaves out; not ok where the type's own method decides on an address.
func isZero(v reflect.Value) (zero, ok bool) {
	t := v.Type()
	if !reflect.PointerTo(t).Implements(zeroType) && !t.Implements(zeroType) {
		return v.IsZero(), true
	}
	if k := t.Kind(); !t.Implements(zeroType) || k == reflect.Pointer || k == reflect.Interface || !v.CanInterface() {
		return false, false
	}
	return v.Interface().(interface{ IsZero() bool }).IsZero(), true
}

func (e *encoder) mapping(v reflect.Value, depth int) bool {
	if v.IsNil() {
		e.text = append(e.text, "null"...)
		return true
	}
	type member struct {
		name  string
		value reflect.Value
	}
	members := make([]member, 0, v.Len())
	for k, m := range v.Seq2() {
		name := ""
		if k.Kind() == reflect.String {
			name = k.String()
		} else if k.Kind() == reflect.Pointer || k.Kind() == reflect.Interface || !k.CanInterface() {
			return false
		} else if b, err := k.Interface().(encoding.TextMarshaler).MarshalText(); err != nil {
			return false
		} else {
			name = string(b)
		}
		members = append(members, member{name, m})
	}
	slices.SortFunc(members, func(a, b member) int { return strings.Compare(a.name, b.name) })
	e.text = append(e.text, '{')
	for i, m := range members {
		if i > 0 {
			e.text = append(e.text, ',')
		}
		if !e.str(m.name) {
			return false
		}
		e.text = append(e.text, ':')
		if !e.value(m.value, depth+1) {
			return false
		}
	}
	e.text = append(e.text, '}')
	return true
}

func (e *encoder) list(v reflect.Value, depth int) bool {
	e.text = append(e.text, '[')
	for i := range v.Len() {
		if i > 0 {
			e.text = append(e.text, ',')
		}
		if !e.value(v.Index(i), depth+1) {
			return false
		}
	}
	e.text = append(e.text, ']')
	return true
}

// str appends a string. One with anything to escape or to look at is encoding/json's.
func (e *encoder) str(s string) bool {
	for i := range len(s) {
		c := s[i]
		if c < ' ' || c > '~' || c == '"' || c == '\\' || e.html && (c == '<' || c == '>' || c == '&') {
			return e.delegate(reflect.ValueOf(s))
		}
	}
	e.text = append(append(append(e.text, '"'), s...), '"')
	return true
}

// delegate has encoding/json encode one value. The address comes with it: a method may be the pointer's.
func (e *encoder) delegate(v reflect.Value) bool {
	if v.CanAddr() {
		v = v.Addr()
	}
	if !v.CanInterface() {
		return false
	}
	marshal := unescaped
	if e.html {
		marshal = json.Marshal
	}
	b, err := marshal(v.Interface())
	e.text = append(e.text, b...)
	return err == nil
}
