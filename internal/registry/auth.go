package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// token is an Authorization header's value for one repository of one endpoint.
type token struct {
	value   string
	expires time.Time
}

func tokenKey(ep Endpoint, path string) string { return ep.String() + " " + path }

// token returns the Authorization header for a repository, "" if none is known.
func (c *Client) token(ep Endpoint, path string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.tokens[tokenKey(ep, path)]
	if t.value == "" || time.Now().After(t.expires) {
		return ""
	}
	return t.value
}

// login answers a 401: it fetches an anonymous token for pulling path from the service that the challenge names. A registry that
// wants a name and password is ErrDenied: logging in does not exist yet.
func (c *Client) login(ctx context.Context, ep Endpoint, path string, challenges []string) error {
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
		scope := params["scope"]
		if scope == "" {
			scope = "repository:" + ep.repo(path) + ":pull"
		}
		q["scope"] = strings.Fields(scope)
		realm.RawQuery = q.Encode()
		t, err := c.fetchToken(ctx, realm.String())
		if err != nil {
			return fmt.Errorf("token from %s: %w", realm.Host, err)
		}
		c.mu.Lock()
		c.tokens[tokenKey(ep, path)] = t
		c.mu.Unlock()
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
	return token{"Bearer " + body.Token, time.Now().Add(time.Duration(body.ExpiresIn-10) * time.Second)}, nil
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
