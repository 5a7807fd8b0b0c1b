package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// token is an Authorization header's value and what it is good for.
type token struct {
	value   string
	scopes  []string
	expires time.Time
}

// covers reports whether the token's scopes include a wanted one.
func (t token) covers(want string) bool {
	i := strings.LastIndexByte(want, ':') + 1
	for _, s := range t.scopes {
		if s == want {
			return true
		}
		if !strings.HasPrefix(s, want[:i]) {
			continue
		}
		has := strings.Split(s[i:], ",")
		if !slices.ContainsFunc(strings.Split(want[i:], ","), func(a string) bool { return !slices.Contains(has, a) }) {
			return true
		}
	}
	return false
}

// token returns the Authorization header for what scopes allow at ep, "" if none is known.
func (c *Client) token(ep Endpoint, scopes []string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	for _, t := range c.tokens[ep.String()] {
		if now.Before(t.expires) && !slices.ContainsFunc(scopes, func(s string) bool { return !t.covers(s) }) {
			return t.value
		}
	}
	return ""
}

// keep remembers a token in place of those that it makes needless.
func (c *Client) keep(ep Endpoint, t token) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	list := slices.DeleteFunc(c.tokens[ep.String()], func(old token) bool {
		return !now.Before(old.expires) || !slices.ContainsFunc(old.scopes, func(s string) bool { return !t.covers(s) })
	})
	c.tokens[ep.String()] = append(list, t)
}

// login answers a 401: it fetches a token for scopes from the service that the challenge names. used is the Authorization that was
// refused; when another goroutine has logged in meanwhile, its token is taken.
func (c *Client) login(ctx context.Context, ep Endpoint, scopes []string, used string, challenges []string) error {
	select {
	case c.logins <- struct{}{}:
		defer func() { <-c.logins }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if t := c.token(ep, scopes); t != "" && t != used {
		return nil
	}
	for _, ch := range challenges {
		scheme, params := parseChallenge(ch)
		if !strings.EqualFold(scheme, "bearer") || params["realm"] == "" {
			continue
		}
		realm, err := url.Parse(params["realm"])
		if err != nil || realm.Host == "" || (realm.Scheme != "https" && (realm.Scheme != "http" || ep.Scheme != "http")) {
			return fmt.Errorf("the registry names %q as its token service: %w", oneLine(params["realm"]), ErrUnsupported)
		}
		q := realm.Query()
		if params["service"] != "" {
			q.Set("service", params["service"])
		}
		q["scope"] = scopes
		realm.RawQuery = q.Encode()
		t, err := c.fetchToken(ctx, realm.String())
		if err != nil {
			return fmt.Errorf("token from %s: %w", realm.Host, err)
		}
		t.scopes = scopes
		c.keep(ep, t)
		return nil
	}
	return &AnswerError{Status: http.StatusUnauthorized, Code: "UNAUTHORIZED", Message: "authentication required"}
}

func (c *Client) fetchToken(ctx context.Context, target string) (token, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return token{}, err
	}
	req.Header.Set("User-Agent", "conex")
	resp, err := c.http.Do(req)
	if err != nil {
		return token{}, plain(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return token{}, answerError(resp)
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxError))
	if err != nil {
		return token{}, err
	}
	var body struct {
		Token       string `json:"token"`
		AccessToken string `json:"access_token"`
		ExpiresIn   int    `json:"expires_in"`
	}
	if err := json.Unmarshal(raw, &body); err != nil {
		return token{}, fmt.Errorf("decode token: %w", err)
	}
	if body.Token == "" {
		body.Token = body.AccessToken
	}
	if body.Token == "" || strings.ContainsAny(body.Token, "\r\n") {
		return token{}, fmt.Errorf("the answer holds no token: %w", ErrMismatch)
	}
	if body.ExpiresIn < 60 || body.ExpiresIn > 24*3600 {
		body.ExpiresIn = 60 // the specification's default; also keeps a nonsense value from overflowing
	}
	// Ten seconds early, so that it does not end between our look and the registry's.
	return token{value: "Bearer " + body.Token, expires: time.Now().Add(time.Duration(body.ExpiresIn-10) * time.Second)}, nil
}

// parseChallenge splits a WWW-Authenticate value, RFC 9110 section 11.6.1: Bearer realm="https://a/token",service="b".
func parseChallenge(s string) (scheme string, params map[string]string) {
	scheme, rest, _ := strings.Cut(strings.TrimSpace(s), " ")
	params = map[string]string{}
	for {
		rest = strings.TrimLeft(rest, " ,\t")
		key, after, ok := strings.Cut(rest, "=")
		if !ok {
			return scheme, params
		}
		var val string
		if strings.HasPrefix(after, `"`) {
			val, rest = unquote(after[1:])
		} else {
			val, rest, _ = strings.Cut(after, ",")
			val = strings.TrimSpace(val)
		}
		params[strings.ToLower(strings.TrimSpace(key))] = val
	}
}

// unquote reads up to the closing quote of a quoted string and returns what follows it.
func unquote(s string) (val, rest string) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '"':
			return b.String(), s[i+1:]
		case s[i] == '\\' && i+1 < len(s):
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String(), ""
}
